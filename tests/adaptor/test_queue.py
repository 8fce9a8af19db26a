import pytest
import torch
from contracts.objective_contract import DIM, IMAGE_DIM, TEXT_DIM, random_batch
from torch.nn import functional

from featcache.adaptor import objective as objective_module
from featcache.adaptor.known import KnownPairs
from featcache.adaptor.losses import Ids, positives, sigmoid
from featcache.adaptor.model import AdaptorConfig
from featcache.adaptor.queue import Queue
from featcache.adaptor.saved import build_adaptor


def vectors(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(count, DIM, generator=generator), dim=-1)


def numbered(*numbers):
    return Ids(torch.tensor(numbers), torch.tensor(numbers))


def built(objective="dual", loss="infonce"):
    torch.manual_seed(0)
    config = AdaptorConfig(
        dim=DIM, heads=4, feedforward=24, dropout=0.0, objective=objective, loss=loss
    )
    return build_adaptor(config, IMAGE_DIM, TEXT_DIM)


def test_it_keeps_the_last_pairs():
    queue, all_of_them = Queue(5, DIM), vectors(7)
    assert len(queue) == 0
    queue.push(all_of_them[:3], all_of_them[:3], numbered(0, 1, 2))
    assert len(queue) == 3
    queue.push(all_of_them[3:], all_of_them[3:], numbered(3, 4, 5, 6))
    images, texts, ids = queue.content()
    assert sorted(ids.images.tolist()) == sorted(ids.texts.tolist()) == [2, 3, 4, 5, 6]
    assert torch.equal(images, all_of_them[ids.images])
    assert torch.equal(texts, all_of_them[ids.texts])


def test_of_a_batch_larger_than_itself_it_keeps_the_end():
    queue, all_of_them = Queue(2, DIM), vectors(5)
    queue.push(None, all_of_them, numbered(0, 1, 2, 3, 4))
    assert sorted(queue.content()[2].texts.tolist()) == [3, 4]


def test_its_state_can_be_saved_and_goes_on_in_the_same_place():
    queue, other = Queue(5, DIM), Queue(5, DIM)
    queue.push(vectors(3), vectors(3), numbered(0, 1, 2))
    other.load_state_dict(queue.state_dict())
    for one in (queue, other):
        one.push(vectors(4, 1), vectors(4, 2), numbered(7, 8, 9, 10))
    for name, tensor in queue.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_it_is_no_part_of_a_saved_objective():
    adaptor, objective = built()
    before = set(objective.state_dict())
    objective(adaptor, random_batch(), queue=Queue(4, DIM))
    assert set(objective.state_dict()) == before


def one_way(logits, own):
    own_mean = (logits * own).sum(dim=1) / own.sum(dim=1)
    return (logits.logsumexp(dim=1) - own_mean).mean()


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize("further", [0, 4])
def test_the_loss_with_a_queue_is_that_of_the_matrix_written_down(
    monkeypatch, loss, in_blocks, further
):
    if in_blocks:
        monkeypatch.setattr(objective_module, "LOGITS_AT_ONCE", 0)
    adaptor, objective = built(loss=loss)
    batch, queue = random_batch(6), Queue(4, DIM)
    # Of the queue, the first text is that of pair 2, the last image that of pair 5.
    earlier = Ids(torch.tensor([90, 91, 92, 5]), torch.tensor([2, 93, 94, 95]))
    queue.push(vectors(4), vectors(4, 1), earlier)
    # Of the training set: an image of the batch with a text of the queue, and so on.
    pairs = torch.tensor([(1, 93), (91, 4), (90, 94), (0, 3)])[:further]
    whole = Ids.of(batch) + earlier + Ids(*pairs.T.contiguous())
    known = KnownPairs.of(whole.images.numpy(), whole.texts.numpy())
    found = objective(adaptor, batch, queue=queue, known=known)
    images = torch.cat([objective.encode_images(adaptor, batch.image_tokens), vectors(4)])
    texts = objective.encode_texts(adaptor, batch.text_tokens, batch.text_valid)
    texts = torch.cat([texts, vectors(4, 1)])
    ids = Ids(batch.image_rows, batch.text_rows) + earlier
    logits, own = objective.score(images, texts, adaptor.scale), positives(ids, ids)
    for image, text in pairs.tolist():
        place = ids.images.tolist().index(image), ids.texts.tolist().index(text)
        assert not own[place]
        own[place] = True
    if loss == "infonce":
        expected = (one_way(logits[:6], own[:6]) + one_way(logits.T[:6], own.T[:6])) / 2
    else:
        bias = objective.contrast.bias
        new = sigmoid(logits[:6], own[:6], bias) * 6
        expected = (new + sigmoid(logits[6:, :6], own[6:, :6], bias) * 4) / 6
    assert own.sum() > 10
    assert torch.allclose(found.loss, expected, atol=1e-5)
    found.loss.backward()
    assert adaptor.image_projection.weight.grad.abs().max() > 0


@pytest.mark.parametrize("objective", ["dual", "allpairs", "paper"])
def test_a_batch_joins_in_training_alone(objective):
    (adaptor, built_one), queue = built(objective), Queue(8, DIM)
    built_one.eval()(adaptor, random_batch(), queue=queue)
    assert len(queue) == 0
    built_one.train()
    first = built_one(adaptor, random_batch(6, 1), queue=queue).loss
    second = built_one(adaptor, random_batch(6, 1), queue=queue).loss
    assert len(queue) == 8
    assert first != second
    second.backward()


def test_an_empty_queue_changes_nothing():
    adaptor, objective = built()
    plain = objective(adaptor, random_batch()).loss
    assert torch.equal(objective(adaptor, random_batch(), queue=Queue(3, DIM)).loss, plain)
