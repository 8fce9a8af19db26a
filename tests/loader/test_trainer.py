"""The loader as Lightning's dataloader: whole epochs, and a resume in the middle of one."""

import lightning
import pytest
import torch

from featcache.loader.gather import TokenLoader
from featcache.loader.order import Order

# Lightning 2.6 uses a name that torch 2.14 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")


class Recorder(lightning.LightningModule):
    """Notes the pairs that it is given."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
        self.seen = []
        self.stop_at = stop_at

    def training_step(self, batch, _):
        self.seen.append(batch.pairs.tolist())
        return self.layer(batch.image_tokens.float()).mean()

    def on_train_batch_end(self, *_):
        if len(self.seen) == self.stop_at:
            self.trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, loader, path=None):
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, ckpt_path=path)


def test_every_epoch_of_a_trainer_is_whole(made):
    module = Recorder()
    fit(module, TokenLoader(made.cache, 12, seed=5))
    order = Order(made.cache.num_pairs, 12, seed=5)
    assert module.seen == [order.batch(step).tolist() for step in range(9)]


def test_a_trainer_takes_int8_and_resident_sets_and_length_windows(make_cache):
    cache = make_cache("int8").cache
    for options in ({}, {"resident": "cpu"}, {"length_window": 2}):
        module = Recorder()
        fit(module, TokenLoader(cache, 12, seed=5, **options))
        assert len(module.seen) == 9
        assert len({pair for pairs in module.seen for pair in pairs}) == 41


@pytest.mark.parametrize("stop_at", [2, 3, 4])
def test_a_trainer_resumes_with_the_next_pair(made, tmp_path, stop_at):
    first = Recorder(stop_at)
    first.path = tmp_path / "state.ckpt"
    with pytest.raises(SystemExit):
        fit(first, TokenLoader(made.cache, 12, seed=5))
    second = Recorder()
    fit(second, TokenLoader(made.cache, 12, seed=5, threads=3), first.path)
    order = Order(made.cache.num_pairs, 12, seed=5)
    assert first.seen + second.seen == [order.batch(step).tolist() for step in range(9)]
