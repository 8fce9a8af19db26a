import os
import signal
import threading

import pytest

from featcache.adaptor.signals import SIGNALS, StopSignals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_its_handler_given_back(number):
    before = [signal.getsignal(one) for one in SIGNALS]
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_a_second_ctrl_c_stops_at_once():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == signal.SIGTERM


def test_the_signals_are_taken_back_from_somebody_else():
    with StopSignals() as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop.take_over()
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGTERM


def test_outside_the_main_thread_nothing_is_changed():
    before = [signal.getsignal(one) for one in SIGNALS]
    found = []

    def inside():
        with StopSignals():
            found.extend(signal.getsignal(one) for one in SIGNALS)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == before
