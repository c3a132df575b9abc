"""Labels to codes, logits, flips and sliders; every kind of attribute, unknown labels among them."""

from __future__ import annotations

import math

import pytest
import torch

from fader.attributes import Attribute, Attributes
from fader.draws import Draws
from fader.losses.attributes import attribute_losses

HAIR = Attribute("Hair", "k-way", ("black", "blond", "brown"))
ALL = Attributes([Attribute("Male"), HAIR, Attribute("Age", "continuous")])


def draws(count: int, draw: int = 0) -> Draws:
    return Draws.of(1, "test", draw, torch.arange(count))


def test_a_binary_code_is_absent_present():
    """Column v of the pair belongs to label v, as in the official code."""
    code = Attributes([Attribute("Male")]).code(torch.tensor([[0.0], [1.0]]))
    assert code.tolist() == [[1, 0], [0, 1]]


def test_codes_stand_in_attribute_order_and_unknown_is_even():
    labels = torch.tensor([[1.0, 2.0, 0.25], [-1.0, -1.0, -1.0]])
    code = ALL.code(labels)
    assert code[0].tolist() == [0, 1, 0, 0, 1, 0.75, 0.25]
    assert torch.allclose(code[1], torch.tensor([0.5, 0.5, 1 / 3, 1 / 3, 1 / 3, 0.5, 0.5]))
    assert code.dtype == torch.float32 and ALL.code_width == 7
    assert [(s.start, s.stop) for s in ALL.code_slices()] == [(0, 2), (2, 5), (5, 7)]


def test_a_slider_at_an_end_is_exactly_the_label():
    unknown = ALL.code(torch.full((1, 3), -1.0))
    for name, label, slider in (("Male", 0, -1), ("Male", 1, 1), ("Age", 0, -1), ("Age", 1, 1)):
        j = ALL.index(name)
        code = ALL.with_slider(unknown, name, slider)
        asked = torch.full((1, 3), -1.0)
        asked[0, j] = label
        assert torch.equal(code, ALL.code(asked)), (name, slider)


def test_a_slider_goes_on_beyond_its_ends_and_leaves_the_others_alone():
    code = ALL.code(torch.tensor([[0.0, 1.0, 0.5]]))
    before = code.clone()
    moved = ALL.with_slider(code, "Male", 3)
    assert torch.equal(code, before), "with_slider must copy"
    assert moved[0].tolist() == [-1, 2, 0, 1, 0, 0.5, 0.5]
    assert ALL.with_slider(code, "Male", 0)[0, :2].tolist() == [0.5, 0.5]


def test_a_slider_may_differ_from_record_to_record():
    code = ALL.code(torch.zeros(3, 3))
    moved = ALL.with_slider(code, "Male", torch.tensor([-1.0, 0.0, 1.0]))
    assert moved[:, 1].tolist() == [0, 0.5, 1]


def test_a_k_way_slider_is_exact_at_its_category_and_even_at_its_absence():
    code = ALL.code(torch.zeros(1, 3))
    asked = torch.tensor([[0.0, 2.0, 0.0]])
    assert torch.equal(ALL.with_slider(code, "Hair", 1, category=2), ALL.code(asked))
    assert ALL.with_slider(code, "Hair", -1, category=2)[0, 2:5].tolist() == [0.5, 0.5, 0]
    assert torch.allclose(ALL.with_slider(code, "Hair", 0.3, category=0)[0, 2:5].sum(), torch.tensor(1.0))
    for category in (None, 3, -1):
        with pytest.raises(ValueError, match="Hair has 3 values"):
            ALL.with_slider(code, "Hair", 1, category=category)


def test_a_flip_is_the_opposite_or_another_category_uniformly():
    count = 30_000
    labels = torch.stack([torch.arange(count) % 2, torch.arange(count) % 3, torch.arange(count) % 5 / 4], 1).float()
    flipped = ALL.flipped(labels, draws(count))
    assert torch.equal(flipped[:, 0], 1 - labels[:, 0])
    assert torch.equal(flipped[:, 2], 1 - labels[:, 2])
    assert (flipped[:, 1] != labels[:, 1]).all()
    for category in range(3):
        others = flipped[labels[:, 1] == category, 1]
        assert set(others.tolist()) == {0.0, 1.0, 2.0} - {float(category)}
        share = (others == (category + 1) % 3).float().mean().item()
        assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(count / 3)  # four standard errors
    assert not torch.equal(flipped[:, 1], ALL.flipped(labels, draws(count, draw=1))[:, 1]), "drawn anew each time"


def test_unknown_labels_stay_unknown_in_a_flip():
    labels = torch.full((5, 3), -1.0)
    assert torch.equal(ALL.flipped(labels, draws(5)), labels)


def test_resampled_labels_are_uniform_over_each_attributes_values():
    labels = ALL.resampled(draws(30_000))
    assert abs(labels[:, 0].mean().item() - 0.5) < 0.012
    for category in range(3):
        assert abs((labels[:, 1] == category).float().mean().item() - 1 / 3) < 0.011
    assert 0 <= labels[:, 2].min() and labels[:, 2].max() < 1 and abs(labels[:, 2].mean().item() - 0.5) < 0.007


def test_a_swap_moves_one_attribute_only():
    labels = torch.tensor([[0.0, 1.0, 0.5], [1.0, 2.0, 0.0]])
    swapped = ALL.swapped(labels, "Hair", 0)
    assert swapped.tolist() == [[0, 0, 0.5], [1, 0, 0]]
    assert labels[:, 1].tolist() == [1, 2], "the labels given must stay"


@pytest.mark.parametrize("head, widths", [("softmax", [2, 3, 1]), ("sigmoid", [1, 3, 1])])
def test_logits_are_a_block_of_its_own_width_each(head, widths):
    assert ALL.logits_width(head) == sum(widths)
    logits = torch.arange(sum(widths)).float()[None]
    blocks = ALL.blocks(logits, head)
    assert [block.shape[1] for block in blocks] == widths
    assert torch.equal(torch.cat(blocks, 1), logits)
    with pytest.raises(ValueError, match="logits are"):
        ALL.blocks(torch.zeros(2, sum(widths) + 1), head)


def test_losses_by_hand():
    """ln(1 + e^-2) for softmax logits (0, 2) and label 1; the same for one sigmoid logit 2."""
    male = Attributes([Attribute("Male")])
    want = math.log(1 + math.exp(-2))
    one = torch.ones(1)
    label = torch.tensor([[1.0]])
    assert attribute_losses(male, torch.tensor([[0.0, 2.0]]), label, one).item() == pytest.approx(want, rel=1e-6)
    assert attribute_losses(male, torch.tensor([[2.0]]), label, one, "sigmoid").item() == pytest.approx(want, rel=1e-6)
    hair = Attributes([HAIR])
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    want = math.log(sum(math.exp(v) for v in (1, 2, 3))) - 1
    assert attribute_losses(hair, logits, torch.tensor([[0.0]]), one).item() == pytest.approx(want, rel=1e-6)
    age = Attributes([Attribute("Age", "continuous")])
    assert attribute_losses(age, torch.tensor([[0.0]]), torch.tensor([[0.8]]), one).item() == pytest.approx(0.09, rel=1e-5)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_unknown_labels_are_masked_and_leave_no_gradient(head):
    logits = torch.randn(4, ALL.logits_width(head), requires_grad=True)
    labels = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0], [-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    known = (labels >= 0).sum(0).float()
    losses = attribute_losses(ALL, logits, labels, known, head)
    assert torch.allclose(losses, attribute_losses(ALL, logits[:2], labels[:2], known, head))
    losses.sum().backward()
    assert not logits.grad[2:].any() and logits.grad[:2].any()


def test_nobody_known_gives_zero_not_nan():
    labels = torch.full((3, 3), -1.0)
    logits = torch.randn(3, 6, requires_grad=True)
    losses = attribute_losses(ALL, logits, labels, torch.zeros(3))
    losses.sum().backward()
    assert losses.tolist() == [0, 0, 0] and not logits.grad.any()


def test_shares_of_a_batch_average_to_the_whole():
    """Uneven shares with unevenly known labels: the parts, averaged over two ranks, are the global mean."""
    torch.manual_seed(0)
    labels = torch.tensor([[1.0, 2, 0.5], [0, -1, 0], [-1, 1, -1], [1, 0, 1], [0, 0, 0.2]])
    logits = torch.randn(5, 6)
    known = (labels >= 0).sum(0).float()
    parts = [attribute_losses(ALL, logits[s], labels[s], known / 2) for s in (slice(0, 3), slice(3, 5))]
    assert torch.allclose((parts[0] + parts[1]) / 2, attribute_losses(ALL, logits, labels, known))


def test_preds_undo_losses():
    labels = torch.tensor([[1.0, 2.0, 0.25], [0.0, 1.0, 0.75]])
    age = torch.logit(labels[:, 2:])
    hair = torch.nn.functional.one_hot(labels[:, 1].long(), 3) * 9.0
    softmax = torch.cat([torch.nn.functional.one_hot(labels[:, 0].long(), 2) * 9.0, hair, age], 1)
    sigmoid = torch.cat([labels[:, :1] * 18 - 9, hair, age], 1)
    for head, logits in (("softmax", softmax), ("sigmoid", sigmoid)):
        assert torch.allclose(ALL.preds(logits, head), labels, atol=1e-6)
        for block in ALL.probabilities(logits, head):
            assert torch.allclose(block.sum(1), torch.ones(2))


def test_swaps_ask_for_every_other_value_once_and_change_nothing_else():
    labels = torch.tensor([[1.0, 2.0, 0.25], [0.0, 0.0, 0.75], [-1.0, 1.0, -1.0]])
    asked: dict[int, list[torch.Tensor]] = {0: [labels[:, 0]], 1: [labels[:, 1]], 2: [torch.tensor([0.0, 1.0, 0.0])]}
    for column, step, changed, target in ALL.swaps(labels):
        assert torch.equal(changed[:, column].long(), target) and len(asked[column]) == step
        others = [j for j in range(3) if j != column]
        assert torch.equal(changed[:, others], labels[:, others])
        asked[column].append(target)
    for column, values in asked.items():
        known = torch.stack(values)[:, labels[:, column] >= 0]
        assert (known.sort(0).values == torch.arange(ALL[column].k)[:, None]).all(), "each value once a record"


def test_a_hard_label_stands_at_the_nearer_end_of_a_continuous_attribute():
    labels = torch.tensor([0.0, 0.49, 0.5, 1.0, -1.0])
    assert ALL[2].hard(labels).tolist() == [0, 0, 1, 1, -1]
    assert ALL[1].hard(torch.tensor([2.0, -1.0])).tolist() == [2, -1]


def test_joint_values_move_to_every_other_joint_value_and_unknown_ones_stay():
    two = ALL.select(["Male", "Hair"])
    labels = torch.tensor([[i % 2, i // 2 % 3] for i in range(600)] + [[-1, 2]] * 3).float()
    assert two.joint(torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, -1.0]])).tolist() == [3, 5, -1]
    moved = two.moved_jointly(labels, draws(len(labels)), "m")
    assert torch.equal(moved[600:], labels[600:])
    before, after = two.joint(labels[:600]), two.joint(moved[:600])
    for start in range(6):
        assert set(after[before == start].tolist()) == set(range(6)) - {start}


def test_names_are_found_or_the_nearest_is_offered():
    attributes = Attributes([Attribute("Smiling"), HAIR])
    assert attributes.select(["Hair", "Smiling"]).names == ("Hair", "Smiling")
    with pytest.raises(ValueError, match="did you mean 'Smiling'"):
        attributes.index("Smilling")
    assert attributes.resolve("Hair.blond") == ("Hair", 1) == attributes.resolve("Hair.1")
    assert attributes.resolve("Smiling") == ("Smiling", None)
    for spec in ("Hair.grey", "Smiling.1", "Hair.3", "Beard"):
        with pytest.raises(ValueError):
            attributes.resolve(spec)


def test_a_list_goes_to_a_dictionary_and_back():
    assert Attributes.from_list(ALL.to_list()) == ALL
    for wrong in (
        lambda: Attributes([Attribute("A"), Attribute("A")]),
        lambda: Attribute("A", "k-way"),
        lambda: Attribute("A", "binary", ("x", "y")),
        lambda: Attribute("A", "ternary"),
    ):
        with pytest.raises(ValueError):
            wrong()


@pytest.mark.parametrize("row", [[2.0, 0, 0], [0.5, 0, 0], [0, 3, 0], [0, 0, 1.5], [-2, 0, 0], [0, 0, -0.5]])
def test_wrong_labels_are_named(row):
    with pytest.raises(ValueError, match="has the label"):
        ALL.check_labels(torch.tensor([row]))
    ALL.check_labels(torch.tensor([[1.0, 2, 0.5], [-1, -1, -1]]))
