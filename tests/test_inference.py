"""tpinv.inference: what engines share depends on one request, not on the batch around it, and is the trainer's number."""

import pytest
import torch

from tpinv import ReductionTree, inference, vocab_parallel_log_probs
from tpinv.inference.sampling import _philox
from tpinv.testing import assert_bitwise_equal, run_ranks

TREE = ReductionTree(8)
VOCABULARY = 1003  # no multiple of a vector, and no equal leaves


def logits(rows: int, dtype=torch.float32, vocabulary: int = VOCABULARY) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, vocabulary, generator=generator) * torch.exp2(torch.randint(-4, 4, (rows, vocabulary), generator=generator))
    x[:, ::17] = -torch.inf
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_probs_are_the_trainers(dtype):
    x = logits(5, dtype)
    target = torch.tensor([1, 2, 3, 1000, 501])
    whole = inference.log_softmax(x, TREE)
    assert_bitwise_equal(whole.gather(1, target[:, None])[:, 0], vocab_parallel_log_probs(x, target, tree=TREE))
    several = torch.stack([target, target.flip(0)], 1)
    assert_bitwise_equal(inference.token_log_probs(x, several, TREE), whole.gather(1, several))
    torch.testing.assert_close(whole, x.float().log_softmax(-1), rtol=1e-5, atol=1e-5)


def _sharded_log_probs(x, target):
    import torch.distributed as dist

    mine = x.chunk(dist.get_world_size(), -1)[dist.get_rank()].contiguous()
    total = mine.float().exp().sum(-1)
    dist.all_reduce(total)
    return vocab_parallel_log_probs(mine, target, tree=TREE), total


def test_an_engine_has_the_log_probs_of_a_trainer_at_another_tp():
    x = torch.randn(6, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = torch.tensor([1, 2, 1003, 700, 512, 5])
    expected = inference.log_softmax(x, TREE).gather(1, target[:, None])[:, 0]
    for found, stock in run_ranks(_sharded_log_probs, 4, x, target):
        assert_bitwise_equal(found, expected)
        assert not torch.equal(stock, x.float().exp().sum(-1))


def test_rows_do_not_know_the_batch():
    x = logits(9, torch.bfloat16)
    whole = inference.log_softmax(x, TREE)
    k, p = torch.tensor([3, 40, VOCABULARY] * 3), torch.tensor([1.0, 0.9, 0.5] * 3)
    kept = inference.keep_top(x.float(), k, p)
    seeds, positions = list(range(9)), list(range(100, 109))
    drawn = inference.sample(kept, seeds, positions)
    for i in range(9):
        one = slice(i, i + 1)
        assert_bitwise_equal(inference.log_softmax(x[one], TREE), whole[one])
        assert_bitwise_equal(inference.keep_top(x[one].float(), k[one], p[one]), kept[one])
        assert inference.sample(kept[one], seeds[one], positions[one]).item() == drawn[i].item()


def test_philox_is_philox():
    """The known answers of Random123's distribution for counter and key zero, and for the digits of pi."""
    assert [int(word) for word in _philox(torch.tensor([0]), 0, 0)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    first = _philox(torch.tensor([1]), 0, 0)
    assert len({int(word) for word in first}) == 4 and int(first[0]) != 0x6627E8D5


def test_noise_is_gumbel_and_keyed_by_seed_and_position():
    noise = inference.gumbel_noise(7, 3, 200_000)
    assert abs(noise.mean().item() - 0.5772) < 0.02 and abs(noise.var().item() - torch.pi**2 / 6) < 0.03
    assert noise.isfinite().all()
    assert_bitwise_equal(noise[:1000], inference.gumbel_noise(7, 3, 1000))
    for seed, position in ((8, 3), (7, 4), (7 + (1 << 40), 3), (-1, 3)):
        assert not torch.equal(inference.gumbel_noise(seed, position, 1000), noise[:1000])
    batch = inference.gumbel_noise(torch.tensor([[7], [8]]), torch.tensor([[3], [3]]), 1000)
    assert_bitwise_equal(batch[0], noise[:1000])


def test_samples_follow_the_distribution():
    x = torch.tensor([0.0, 1.0, 2.0, -torch.inf]).expand(5_000, 4)
    drawn = inference.sample(x, [5] * len(x), list(range(len(x))))
    frequencies = torch.bincount(drawn, minlength=4) / len(x)
    torch.testing.assert_close(frequencies, x[0].softmax(-1), atol=0.024, rtol=0)
    assert frequencies[3] == 0


def test_ties():
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert inference.greedy(x).tolist() == [1, 0]
    kept = inference.keep_top(x, torch.tensor([1, 2]), None)
    assert kept.isfinite().tolist() == [[False, True, False, False], [True, True, False, False]]
    at_least_one = inference.keep_top(x, None, torch.tensor([1e-6, 0.5]))
    assert at_least_one.isfinite().tolist() == [[False, True, False, False], [True, True, False, False]]


def test_keep_top_keeps_what_vllm_documents():
    x = logits(4).nan_to_num(neginf=-50.0)
    k = torch.tensor([1, 5, 50, VOCABULARY])
    kept = inference.keep_top(x, k, None)
    assert kept.isfinite().sum(-1).tolist() == k.tolist()
    p = torch.tensor([0.1, 0.5, 0.9, 1.0])
    probabilities = x.double().softmax(-1)
    mass = (probabilities * inference.keep_top(x, None, p).isfinite()).sum(-1)
    assert (mass >= p.double() - 1e-9).all()
    assert inference.keep_top(x, None, None) is x


def test_empty_batches():
    x = torch.empty(0, 10)
    assert inference.log_softmax(x, TREE).shape == (0, 10)
    assert inference.sample(x, [], []).shape == (0,)
    assert inference.keep_top(x, torch.empty(0, dtype=torch.int64), None).shape == (0, 10)


def test_errors():
    with pytest.raises(ValueError, match=r"\[M, V\] and \[M, k\]"):
        inference.token_log_probs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), TREE)
    with pytest.raises(ValueError, match="float64"):
        inference.log_softmax(torch.zeros(2, 3, dtype=torch.float64), TREE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_topk_takes_the_smaller_of_equal_indices(dtype):
    x = torch.randn(6, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, ::3], x[1], x[2, 5], x[2, 9] = 1.0, float("-inf"), -0.0, 0.0
    x[1, 7] = 2.0
    values, indices = inference.topk(x, 300)
    expected = torch.sort(x + 0.0, dim=-1, descending=True, stable=True).indices[:, :300]
    assert torch.equal(indices, expected)
    assert_bitwise_equal(values, x.gather(-1, expected))
