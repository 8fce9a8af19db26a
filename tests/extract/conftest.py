"""The fixtures of `conftest_extract`, under the name that pytest looks for."""

from conftest_extract import copied, extracted

__all__ = ["copied", "extracted"]
