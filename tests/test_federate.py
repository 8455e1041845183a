"""Partitions of data over clients, and what is said of clients before they are combined."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glue.errors import GlueError
from glue.federate import partition
from glue.federate.heterogeneity import ROWS, Change, compare
from glue.federate.ledger import lora_bytes

GROUPS = ["facts"] * 300 + ["kind"] * 200 + ["trans"] * 100


def owners(parts: list[np.ndarray], count: int) -> np.ndarray:
    """How often each item was given away."""
    return np.bincount(np.concatenate(parts), minlength=count)


@settings(max_examples=40)
@given(st.integers(1, 12), st.sampled_from([0.1, 0.5, 10.0]), st.integers(0, 2**32 - 1))
def test_every_item_goes_to_exactly_one_client(clients, alpha, seed):
    shares = [{"facts": 1.0, "kind": k + 1.0, "trans": float(k == 0)} for k in range(clients)]
    for parts in (partition.iid(600, clients, seed), partition.dirichlet(GROUPS, clients, alpha, seed),
                  partition.given(GROUPS, shares, seed)):
        assert len(parts) == clients and (owners(parts, 600) == 1).all()
        assert all(len(part) and (np.diff(part) > 0).all() for part in parts)


def test_the_seed_decides():
    def drawn(seed: int) -> list[list[int]]:
        return [part.tolist() for part in partition.dirichlet(GROUPS, 4, 0.5, seed)]

    assert drawn(3) == drawn(3) != drawn(4)


def test_a_small_alpha_makes_one_sided_clients_and_a_large_one_even_clients():
    def evenness(alpha: float) -> float:
        """The mean over clients of the share of its largest dataset."""
        largest = [np.bincount([("facts", "kind", "trans").index(GROUPS[k]) for k in part]).max() / len(part)
                   for seed in range(20) for part in partition.dirichlet(GROUPS, 4, alpha, seed)]
        return float(np.mean(largest))

    assert evenness(0.1) > 0.8 and evenness(1000.0) == pytest.approx(0.5, abs=0.02)


def test_shares_of_a_dataset_are_as_large_as_said():
    parts = partition.given(GROUPS, [{"facts": 3.0, "kind": 1.0}, {"facts": 1.0, "trans": 2.0}], 0)
    assert [len(part) for part in parts] == [225 + 200, 75 + 100]


def test_whole_datasets_are_dealt_out_in_turn():
    assert [len(part) for part in partition.by_dataset(GROUPS, 3)] == [300, 200, 100]
    assert [len(part) for part in partition.by_dataset(GROUPS, 2)] == [400, 200]


def test_clients_that_would_have_nothing_are_refused():
    with pytest.raises(GlueError, match="client 3 of 4 would have 0 items"):
        partition.by_dataset(GROUPS, 4)
    with pytest.raises(GlueError, match="no client has a share of 'kind'"):
        partition.given(GROUPS, [{"facts": 1.0}, {"trans": 1.0}], 0)
    with pytest.raises(GlueError, match="leaves each of 50 clients 30 items"):
        partition.dirichlet(GROUPS, 50, 0.01, 0, least=30)


def changes(seed: int, rank: int | None = 3) -> dict[str, Change]:
    """Two matrices that a client changed, [40, 12] and [7, 9], with factors or dense."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name, (m, n) in {"p": (40, 12), "q": (7, 9)}.items():
        if rank is None:
            found[name] = Change(torch.randn(m, n, generator=random))
        else:
            found[name] = Change(torch.randn(m, rank, generator=random), torch.randn(rank, n, generator=random), 0.5)
    return found


def dense(some: dict[str, Change]) -> list[torch.Tensor]:
    return [(one.b if one.a is None else one.scale * one.b.double() @ one.a.double()).double()
            for one in some.values()]


@pytest.mark.parametrize("ranks", [(3, 5, 2), (None, None, None), (4, None, 1)])
def test_norms_and_cosines_are_those_of_the_dense_changes(ranks):
    clients = [changes(seed, rank) for seed, rank in enumerate(ranks)]
    found = compare(["a", "b", "c"], clients, base_norm=10.0)
    flat = torch.stack([torch.cat([part.flatten() for part in dense(one)]) for one in clients])
    assert found.tau == pytest.approx((flat.norm(dim=1) / 10.0).numpy(), rel=1e-12)
    unit = flat / flat.norm(dim=1, keepdim=True)
    assert found.cosines == pytest.approx((unit @ unit.T).numpy(), rel=1e-9, abs=1e-12)


def test_signs_conflict_where_two_clients_pull_apart():
    one = {"p": Change(torch.ones(ROWS, 4))}
    other = {"p": Change(torch.tensor([[1.0, 1.0, -1.0, 0.0]]).repeat(ROWS, 1))}
    found = compare(["a", "b"], [one, other], 1.0)
    assert found.conflicts[0, 1] == found.conflicts[1, 0] == pytest.approx(1 / 3)
    assert found.conflicts[0, 0] == 0


def test_a_client_that_changes_other_matrices_shares_nothing_with_the_rest():
    found = compare(["a", "b"], [{"p": Change(torch.ones(2, 2))}, {"q": Change(torch.ones(2, 2))}], 1.0)
    assert found.cosines.tolist() == [[1, 0], [0, 1]] and found.conflicts.sum() == 0


def test_the_advice_goes_by_how_far_and_how_far_apart():
    small, far, against = torch.full((2, 2), 0.01), torch.full((2, 2), 5.0), torch.full((2, 2), -0.01)

    def advised(*deltas: torch.Tensor) -> str:
        return compare(list("abc")[:len(deltas)], [{"p": Change(delta)} for delta in deltas], 1.0).advice

    assert advised(small) == advised(small, small) == "one round is enough"
    assert advised(small, far) == advised(small, against) == "use several rounds"


def test_bytes_of_an_adapter_by_the_formula():
    assert lora_bytes([(4096, 4096)] * 64, 16, 2) == 16_777_216
