"""Similarity of weights and the families that follow from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glue.checkpoint import InMemory
from glue.cluster.linkage import clusters, families, medoid
from glue.cluster.similarity import PARTS, compatible, similarities, similarity
from glue.errors import CheckpointError

LINKAGES = ["leader", "single", "average", "complete"]


def model(seed: int, *, hidden: int = 8, layers: int = 2, vocab: int = 10, dtype=torch.float32) -> InMemory:
    """Random weights with the names of a Llama; biases and norms are there to be left out."""
    rng = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden)}
    for k in range(layers):
        at = f"model.layers.{k}"
        tensors |= {f"{at}.self_attn.q_proj.weight": matrix(hidden, hidden),
                    f"{at}.self_attn.q_proj.bias": matrix(hidden),
                    f"{at}.mlp.down_proj.weight": matrix(hidden, 3 * hidden),
                    f"{at}.input_layernorm.weight": matrix(hidden)}
    return InMemory(tensors)


def near(source: InMemory, seed: int, much: float) -> InMemory:
    """The same model, moved by noise."""
    rng = torch.Generator().manual_seed(seed)
    return InMemory({name: source[name] + much * torch.randn(source[name].shape, generator=rng) for name in source})


def only(name: str, values) -> InMemory:
    return InMemory({name: torch.tensor(values, dtype=torch.float32)})


def test_the_similarity_of_two_small_matrices_is_what_one_gets_by_hand():
    one = only("mlp.w", [[1.0, 3.0], [0.0, 4.0]])
    other = only("mlp.w", [[1.0, 4.0], [1.0, 3.0]])
    assert similarity([one, other])[0, 1] == pytest.approx((2 ** -0.5 + 24 / 25) / 2, abs=1e-7)


def test_each_tensor_counts_once_however_large_it_is():
    alike, unlike = torch.ones(2, 50), torch.tensor([[1.0], [0.0]])
    one = InMemory({"mlp.large": alike, "mlp.small": unlike})
    other = InMemory({"mlp.large": alike, "mlp.small": unlike.flip(0)})
    assert similarity([one, other])[0, 1] == pytest.approx(0.5, abs=1e-7)


def test_it_is_exactly_symmetric_and_exactly_one_with_itself():
    found = similarity([model(k) for k in range(5)])
    assert (found == found.T).all() and (found.diagonal() == 1).all()


def test_a_copy_is_exactly_alike_up_to_rounding_and_an_independent_model_is_not_alike():
    found = similarity([model(1), model(1), model(2)])
    assert found[0, 1] == pytest.approx(1, abs=1e-6) and abs(found[0, 2]) < 0.2


def test_the_parts_weigh_into_the_whole_by_their_tensors():
    sources = [model(0), near(model(0), 1, 0.5)]
    whole, attention, mlp = (similarity(sources, part=part)[0, 1] for part in ("all", "attention", "mlp"))
    assert whole == pytest.approx((attention + mlp) / 2, abs=1e-9) and attention != pytest.approx(mlp, abs=1e-4)


def test_embeddings_norms_and_biases_do_not_count():
    one = model(0)
    other = InMemory({name: one[name] if one[name].ndim == 2 and "layers" in name else torch.randn(one[name].shape)
                      for name in one})
    assert similarity([one, other])[0, 1] == pytest.approx(1, abs=1e-6)


def test_members_of_other_shapes_are_not_comparable_but_one_more_token_does_not_matter():
    found = similarity([model(0), model(1, hidden=4), model(2, layers=3), model(3, vocab=11)])
    assert np.isnan(found).tolist() == [[False, True, True, False], [True, False, True, True],
                                        [True, True, False, True], [False, True, True, False]]


def test_against_a_base_only_what_was_changed_counts():
    base = model(0)
    siblings = [near(base, 1, 0.1), near(base, 2, 0.1)]
    doubled = InMemory({name: base[name] + 2 * (siblings[0][name] - base[name]) for name in base})
    raw, delta = similarity(siblings)[0, 1], similarity([*siblings, doubled], base=base)
    assert raw > 0.95 and abs(delta[0, 1]) < 0.2 and delta[0, 2] == pytest.approx(1, abs=1e-5)


def test_against_a_base_a_member_of_another_shape_is_comparable_with_nobody():
    found = similarity([model(1), model(2), model(3, hidden=4), model(4, hidden=4)], base=model(0))
    assert np.isfinite(found[0, 1]) and np.isnan(found[2, 3]) and found[2, 2] == 1


def test_a_column_that_is_zero_in_both_is_alike_and_in_one_is_not():
    one, other = only("mlp.w", [[0.0, 0.0, 1.0]]), only("mlp.w", [[0.0, 2.0, 3.0]])
    assert similarity([one, other])[0, 1] == pytest.approx(2 / 3, abs=1e-7)


def test_against_the_base_two_untouched_copies_of_it_are_alike():
    assert similarity([model(0), model(0), model(1)], base=model(0))[0].tolist() == [1, 1, 0]


def test_a_neuron_permuted_twin_is_not_alike_by_weights():
    one = model(0, hidden=64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    twin = InMemory({name: one[name][order] if "mlp" in name else one[name] for name in one})
    found = similarity([one, twin], part="mlp")[0, 1]
    assert abs(found) < 0.2 and clusters(similarity([one, twin], part="mlp"), 0.95) == [[0], [1]]


def test_the_size_of_a_block_does_not_show(monkeypatch):
    sources = [model(k, hidden=16) for k in range(3)]
    whole = similarity(sources)
    for name, value in (("BLOCK", 200), ("LEAST", 48), ("SUMMED", 32)):
        monkeypatch.setattr(f"glue.cluster.similarity.{name}", value)
    assert np.abs(similarity(sources) - whole).max() < 1e-6


def test_halves_are_widened_before_they_are_summed():
    wide = [model(0, hidden=64), near(model(0, hidden=64), 1, 0.3)]
    halves = [InMemory({name: source[name].bfloat16() for name in source}) for source in wide]
    exact = similarity([InMemory({name: half[name].double() for name in half}) for half in halves])[0, 1]
    assert similarity(halves)[0, 1] == pytest.approx(exact, abs=1e-6)


class Counted(InMemory):
    """Notes which tensors are read."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.read: list[str] = []

    def __getitem__(self, name):
        if hasattr(self, "read"):
            self.read.append(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("n", [2, 4, 32])
@pytest.mark.parametrize("per", ["column", "tensor"])
def test_every_tensor_is_read_once_however_many_members_and_progress_sees_each(n, per):
    sources, base, seen = [Counted(dict(model(k))) for k in range(n)], Counted(dict(model(99))), []

    def progress(names):
        for name in names:
            seen.append(name)
            yield name

    similarities(sources, base=base, per=per, progress=progress)
    assert all(sorted(source.read) == sorted(seen) for source in [*sources, base])
    assert len(seen) == len(set(seen)) == 4


def test_one_pass_tells_all_parts_as_a_pass_for_each_does():
    sources, base = [near(model(0), k, 0.3) for k in range(3)], model(0)
    for below in (None, base):
        found = similarities(sources, base=below)
        for part in PARTS:
            assert np.abs(found.cosine[part] - similarity(sources, part=part, base=below)).max() == 0


def test_the_cosine_of_a_whole_matrix_is_what_one_gets_by_hand():
    one, other = only("mlp.w", [[1.0, 3.0], [0.0, 4.0]]), only("mlp.w", [[1.0, 4.0], [1.0, 3.0]])
    found = similarity([one, other, only("mlp.w", [[0.0, 0.0], [0.0, 0.0]])], per="tensor")
    assert found[0, 1] == pytest.approx(25 / (26 * 27) ** 0.5, abs=1e-7) and found[0, 2] == 0


def test_signs_and_lengths_of_changes_are_counted():
    base = only("mlp.w", [[1.0, 1.0], [1.0, 1.0]])
    one = only("mlp.w", [[2.0, 3.0], [0.0, 1.0]])    # changed by   1  2  -1  0
    other = only("mlp.w", [[4.0, 0.0], [0.0, 3.0]])  # changed by   3 -1  -1  2
    found = similarities([one, other, base], base=base)
    assert found.agreement[0, 1] == pytest.approx(2 / 3) and found.overlap[0, 1] == 3 / 4
    assert found.ratio[0, 1] == pytest.approx((6 / 15) ** 0.5) and found.ratio[0, 2] == 0
    assert np.isnan(found.agreement[0, 2]) and found.overlap[0, 2] == 0
    assert similarities([one, other]).agreement is None


def test_independent_changes_agree_in_half_of_their_signs_and_copies_in_all():
    base = model(0, hidden=64)
    sources = [near(base, 1, 0.1), near(base, 2, 0.1), near(base, 1, 0.1)]
    found = similarities(sources, base=base)
    assert found.agreement[0, 1] == pytest.approx(0.5, abs=0.01) and found.agreement[0, 2] == 1
    assert found.ratio[0, 1] == pytest.approx(1, abs=0.01) and found.ratio[0, 2] == 1


def test_threads_change_no_bit_and_leave_the_number_of_torchs_own_as_it_was():
    sources, before = [model(k, hidden=64) for k in range(5)], torch.get_num_threads()
    one, four = (similarity(sources, threads=threads) for threads in (1, 4))
    assert (one == four).all() and torch.get_num_threads() == before


def test_a_copy_is_exactly_alike_in_any_company():
    sources = [model(1, hidden=48), model(2, hidden=48), model(1, hidden=48), near(model(1, hidden=48), 3, 1e-3)]
    for per in ("column", "tensor"):
        found = similarity(sources, per=per)
        assert found[0, 2] == pytest.approx(1, abs=1e-12) and found[0, 3] < 1 - 1e-8


def test_a_model_with_nothing_to_compare_and_packed_weights_are_refused():
    with pytest.raises(CheckpointError, match="source 1 has no matrix whose name says attn or attention or mlp"):
        similarity([model(0), only("backbone.layers.0.mixer", [[1.0]])])
    packed = InMemory({"mlp.w": torch.ones(2, 2, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match="packed weights have no cosine"):
        similarity([packed, packed])


def test_a_weight_that_is_not_a_number_joins_no_family():
    broken = dict(model(0))
    broken["model.layers.0.mlp.down_proj.weight"] = torch.full((8, 24), float("nan"))
    found = similarity([model(0), model(0), InMemory(broken)])
    assert all(clusters(found, 0.85, linkage) == [[0, 1], [2]] for linkage in LINKAGES)


def test_compatible_says_the_first_difference():
    assert compatible(model(0), model(1)) == ""
    assert compatible(model(0), model(1, vocab=11)) == \
        "'model.embed_tokens.weight' is [10, 8] in the first and [11, 8] in the second"
    assert compatible(model(0), model(1, layers=3)) == "'model.layers.2.input_layernorm.weight' is only in the second"
    assert compatible(model(1, layers=3), model(0)) == "'model.layers.2.input_layernorm.weight' is only in the first"


def square(n: int, pairs: dict[tuple[int, int], float], other: float = 0.0) -> np.ndarray:
    found = np.full((n, n), other)
    np.fill_diagonal(found, 1)
    for (a, b), value in pairs.items():
        found[a, b] = found[b, a] = value
    return found


TINY = square(5, {(0, 1): 0.941, (0, 2): 0.906, (1, 2): 0.91, (3, 4): 0.988})  # siblings, one of them by LoRA; others


@pytest.mark.parametrize("linkage", LINKAGES)
def test_siblings_and_a_lora_member_are_one_family_at_85(linkage):
    assert clusters(TINY, 0.85, linkage) == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("linkage", LINKAGES)
def test_the_threshold_is_strict(linkage):
    for value in (0.1, 0.3, 0.85, 0.95):
        assert clusters(square(2, {(0, 1): value}), value, linkage) == [[0], [1]]
        assert clusters(square(2, {(0, 1): value + 1e-9}), value, linkage) == [[0, 1]]


def test_no_member_and_a_single_one_are_partitions_too():
    assert [clusters(np.ones((n, n)), 0.5, linkage) for n in (0, 1) for linkage in LINKAGES] == [[]] * 4 + [[[0]]] * 4


def test_linkages_differ_on_a_chain():
    chain = square(3, {(0, 1): 0.9, (1, 2): 0.89}, other=0.3)
    assert clusters(chain, 0.85, "single") == [[0, 1, 2]]
    assert clusters(chain, 0.85, "complete") == [[0, 1], [2]]
    assert clusters(chain, 0.85, "average") == [[0, 1], [2]] and clusters(chain, 0.55, "average") == [[0, 1, 2]]


def test_with_leaders_the_common_base_gathers_its_children_only_if_it_comes_first():
    base_first = square(3, {(0, 1): 0.956, (0, 2): 0.956, (1, 2): 0.914})
    base_last = base_first[np.ix_([1, 2, 0], [1, 2, 0])]
    assert clusters(base_first, 0.95, "leader") == [[0, 1, 2]]
    assert clusters(base_last, 0.95, "leader") == [[0, 2], [1]]
    assert all(clusters(found, 0.92) == [[0, 1, 2]] for found in (base_first, base_last))


def test_defect_1_a_model_that_fits_no_family_opens_its_own():
    assert clusters(square(3, {}), 0.95, "leader") == [[0], [1], [2]]


@st.composite
def matrices(draw, unique=True):
    n = draw(st.integers(1, 7))
    span = 1000 if unique else 3  # so that most are equal
    values = draw(st.lists(st.integers(-span, span), min_size=n * n, max_size=n * n, unique=unique))
    found = np.array(values, dtype=float).reshape(n, n) / span
    found = np.triu(found, 1) + np.triu(found, 1).T
    for a, b in draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=4)):
        found[a, b] = found[b, a] = np.nan
    np.fill_diagonal(found, 1)
    return found


thresholds = st.floats(-0.99, 0.99)


@given(matrices(), thresholds, st.sampled_from(LINKAGES))
def test_every_member_is_in_exactly_one_family_in_canonical_order(found, threshold, linkage):
    families = clusters(found, threshold, linkage)
    assert sorted(k for family in families for k in family) == list(range(len(found)))
    assert families == sorted(sorted(family) for family in families)


@given(matrices(), thresholds, st.randoms(use_true_random=False))
def test_but_for_leaders_the_order_of_members_does_not_count(found, threshold, random):
    order = random.sample(range(len(found)), len(found))
    for linkage in ("single", "complete"):  # their similarities are among the given ones, which all differ
        moved = clusters(found[np.ix_(order, order)], threshold, linkage)
        assert sorted(sorted(order[k] for k in family) for family in moved) == clusters(found, threshold, linkage)


@given(st.one_of(matrices(), matrices(unique=False)), thresholds, st.randoms(use_true_random=False))
def test_families_and_their_medoids_are_the_same_in_every_order_also_where_similarities_are_equal(found, threshold,
                                                                                                  random):
    n = len(found)
    keys = [f"{k:03d}" for k in random.sample(range(100), n)]
    order = random.sample(range(n), n)
    for linkage in ("single", "average", "complete"):
        straight = families(found, keys, threshold, linkage)
        moved = families(found[np.ix_(order, order)], [keys[k] for k in order], threshold, linkage)
        assert sorted((sorted(order[k] for k in family), order[middle]) for family, middle in moved) == straight
        assert all(middle in family for family, middle in straight)


def test_leaders_keep_the_order_that_is_given():
    base_first = square(3, {(0, 1): 0.956, (0, 2): 0.956, (1, 2): 0.914})
    assert families(base_first, ["z", "y", "x"], 0.95, "leader") == [([0, 1, 2], 0)]
    base_last = base_first[np.ix_([1, 2, 0], [1, 2, 0])]
    assert families(base_last, ["a", "b", "c"], 0.95, "leader") == [([0, 2], 0), ([1], 1)]


@given(matrices(), thresholds)
def test_what_cannot_be_compared_is_never_in_one_family(found, threshold):
    for linkage in ("average", "complete"):
        for family in clusters(found, threshold, linkage):
            assert not np.isnan(found[np.ix_(family, family)]).any()


@given(matrices(), thresholds)
def test_complete_families_resemble_throughout_and_single_ones_leave_no_near_stranger(found, threshold):
    for family in clusters(found, threshold, "complete"):
        assert (found[np.ix_(family, family)] > threshold).all()
    single = clusters(found, threshold, "single")
    for family in single:
        strangers = [k for k in range(len(found)) if k not in family]
        assert not (found[np.ix_(family, strangers)] > threshold).any()


def test_the_medoid_is_nearest_to_the_others_and_the_lowest_where_equal():
    assert medoid(TINY, [0, 1, 2]) == 1 and medoid(TINY, [3, 4]) == medoid(TINY, [4, 3]) == 3 and medoid(TINY, [2]) == 2
    pairs = {(0, 1): 0.1, (2, 3): 0.1, (0, 2): 0.2, (1, 3): 0.2, (0, 3): 0.3, (1, 2): 0.3}
    assert medoid(square(4, pairs), [3, 2, 1, 0]) == 0  # the same three numbers in each row, in other orders
