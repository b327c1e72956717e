"""Two real ranks, launched once: gradients, weights, refusals, the shared backbone, a run that goes back."""

import pytest
import torch
from ranks import run_on_ranks
from workers import backbone_ranks, transformer_ranks
from workers import two_ranks as worker

close = torch.testing.assert_close


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run_on_ranks(lambda accelerator: worker.answers(accelerator, folder), folder, timeout=600)


def test_two_ranks_draw_different_noise_and_hold_the_same_weights(two_ranks):
    first, second = (answers["noisy"] for answers in two_ranks)
    assert not bool((first["noise"] == second["noise"]).any())
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["ema"], second["ema"])


def test_two_ranks_equal_one_rank_that_accumulates(two_ranks, accelerator):
    expected = worker.from_index(accelerator, steps=5, accumulate=2)
    for answers in two_ranks:
        close(answers["from_index"], expected, rtol=0, atol=1e-6)
        close(answers["from_index_accumulated"], expected, rtol=0, atol=1e-6)
    assert not torch.equal(expected, worker.from_index(accelerator, steps=5, accumulate=1))


def test_networks_in_ddp_and_bare_networks_learn_the_same(two_ranks):
    first, second = two_ranks
    for name in ("wrapped", "unwrapped"):
        assert torch.equal(first[name], second[name])
    close(first["wrapped"], first["unwrapped"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_two_ranks_have_the_gradients_of_one_with_the_joined_batch(
    two_ranks, accelerator, dtype, tolerance, accumulate
):
    """Student, fake score and critic; each rank draws its own share of the noise that the one rank has."""
    expected = worker.joined_gradients(accelerator, dtype, accumulate)
    first, second = (answers[f"gradients_{dtype}_{accumulate}"] for answers in two_ranks)
    assert (len(expected["student"]), len(expected["fake"])) == (2, 4)
    for name in ("student", "fake"):
        for ours, theirs, wanted in zip(first[name], second[name], expected[name], strict=True):
            assert torch.equal(ours["gradient"], theirs["gradient"])
            assert ours["gradient"].dtype == dtype
            for part in (slice(None), slice(-first["head"], None)):
                got, gradient = ours["gradient"][part], wanted["gradient"][part]
                assert float(gradient.abs().max()) > 1e-4, "nothing to compare"
                assert float((got - gradient).abs().max() / gradient.abs().max()) < tolerance
    assert torch.equal(first["weights"], second["weights"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_on_two_ranks_networks_of_other_phases_hold_no_gradients(two_ranks, accumulate):
    """The fake score steps in every iteration, the last of all; the student listens to it in every second."""
    for answers in two_ranks:
        notes = answers[f"gradients_{torch.float64}_{accumulate}"]
        assert [note["others_are_none"] for note in notes["fake"]] == [[True, True]] * 4
        assert all(note["others_are_none"][1] for note in notes["student"]), "the teacher"
        assert notes["leaks"] == [False] * 4, "what the student learns by leaves nothing in the fake score"


def test_ranks_stop_together_and_notice_that_they_differ(two_ranks):
    """Weights of a phase that is not due are compared, too."""
    for answers in two_ranks:
        assert "phase 'bad' is not finite in step 2" in answers["not_finite"]
        assert "largest t of the samples to blame is 0.7" in answers["not_finite"]
        assert answers["disagree"] == "the step must be the same on all ranks; got [0, 3]. Share."
        for complaint in (answers["complaint"], answers["complaint_not_due"]):
            assert "weights of phase 'lost' differ between ranks" in complaint


def test_two_ranks_of_the_script_go_back_to_the_same_best_step(two_ranks):
    """Through warm-up, range test, guard and setback: all of it needs ranks that can still speak."""
    first, second = (answers["script"] for answers in two_ranks)
    assert (first["best"], first["setbacks"], first["ended"]) == (0, 1, True)
    weights = [answers.pop("weights") for answers in (first, second)]
    assert first == second
    assert torch.equal(*weights)


def test_the_shared_backbone_steps_like_three_copies_on_one_rank_and_on_two(two_ranks, accelerator):
    one_rank, (first, second) = backbone_ranks.all_steps(accelerator), (x["backbone"] for x in two_ranks)
    for answers in (one_rank, first, second):
        expected = answers["copies False"]
        for name, steps in answers.items():
            for role, step in steps.items():
                assert step.abs().max() > 1e-6
                scale = expected[role].abs().max().item()
                close(step, expected[role], rtol=1e-10, atol=1e-10 * scale, msg=name)
    for name, steps in first.items():
        for role, step in steps.items():
            assert torch.equal(step, second[name][role])
            assert not torch.allclose(step, one_rank[name][role], rtol=1e-3)  # two ranks saw twice the images


def test_ranks_whose_options_code_or_inputs_differ_are_told_before_anything_is_written(two_ranks):
    for answers in two_ranks:
        said = answers["starts"]
        assert "differ in student_every: 2, 3" in said["option"][0]
        assert "differ in code: " in said["code"][0]
        assert 'differ in data: "0", "1"' in said["input"][0]
        assert [wrote for _, wrote in said.values()] == [False, False, False, True]
        assert said["nothing"][0] == ""


@pytest.mark.slow
def test_two_ranks_of_a_transformer_equal_one_process(tmp_path, accelerator):
    """An image under a critic and a video without one: two ranks, and one process with twice the micro-batches."""
    names = transformer_ranks.SHAPES
    ranks = run_on_ranks(
        lambda two: {name: transformer_ranks.steps_of(name, two, accumulate=1) for name in names}, tmp_path
    )
    for name in names:
        one = transformer_ranks.steps_of(name, accelerator, accumulate=2)
        half = transformer_ranks.steps_of(name, accelerator, accumulate=1)
        for role, step in one.items():
            scale = float(step.abs().max())
            assert scale > 1e-4
            assert torch.equal(ranks[0][name][role], ranks[1][name][role])
            close(ranks[0][name][role], step, rtol=0, atol=1e-3 * scale)
            assert (half[role] - step).abs().max() > 0.1 * scale, "the second half of the batch changes nothing"
