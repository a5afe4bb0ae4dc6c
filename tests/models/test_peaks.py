"""Peak memory by phase: what is counted for which phase, and that counting never fails a run."""

import mmap
import sys

import pytest
import torch

from direct_rlhf.models import peaks
from direct_rlhf.models.peaks import MIB, phase, recording

LARGE = 64  # MiB

linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a phase is Linux's")


def hold(size: int) -> None:
    """A mapping of its own: a heap that earlier tests left large would serve a tensor from pages that are resident already."""
    with mmap.mmap(-1, size * MIB) as block:
        for page in range(0, size * MIB, mmap.PAGESIZE):
            block[page] = 1


@linux
def test_a_phase_shows_what_it_held_and_nothing_of_the_phases_before() -> None:
    with recording("cpu") as seen:
        with phase("large"):
            hold(LARGE)
        with phase("small"):
            hold(1)
    assert seen.separate
    between = seen.facts["peak_memory_large"] - seen.facts["peak_memory_small"]
    assert LARGE - 8 < between < LARGE + 8
    assert seen.facts["peak_memory_rest"] < seen.facts["peak_memory_large"] - LARGE / 2


@linux
def test_a_phase_inside_a_phase_belongs_to_the_outer_one() -> None:
    with recording("cpu") as seen, phase("outer"), phase("inner"):
        hold(LARGE)
    assert set(seen.facts) == {"peak_memory_outer", "peak_memory_rest"}


@linux
def test_the_maximum_over_visits_and_attempts_is_kept() -> None:
    with recording("cpu", {"peak_memory_sample": 10.0, "peak_memory_score": 1e9}) as seen:
        for size in (LARGE, 1):
            with phase("sample"):
                hold(size)
        with phase("score"):
            pass
    assert seen.facts["peak_memory_sample"] > LARGE
    assert seen.facts["peak_memory_score"] == 1e9


def test_a_kernel_that_refuses_gives_the_peak_so_far_and_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(peaks, "_CLEAR", tmp_path)  # a folder cannot be written to
    monkeypatch.setattr(peaks, "_STATUS", tmp_path / "none")
    with recording("cpu") as seen:
        with phase("large"):
            hold(LARGE)
        with phase("small"):
            pass
    assert not seen.separate
    assert 0 < seen.facts["peak_memory_large"] <= seen.facts["peak_memory_small"]
    assert "the highest so far" in seen.line()


def test_without_a_recording_a_phase_is_nothing() -> None:
    with phase("sample"):
        pass


def test_a_failing_phase_is_counted_and_its_error_goes_on() -> None:
    with recording("cpu") as seen, pytest.raises(ValueError, match="broken"), phase("sample"):
        raise ValueError("broken")
    assert "peak_memory_sample" in seen.facts
    assert peaks._recording.get() is None


def test_the_line_for_the_screen_names_each_phase_and_the_unit() -> None:
    with recording("cpu", {"peak_memory_update": 1234.4}) as seen:
        pass
    assert seen.line().startswith("peak memory (resident, MiB")
    assert "update 1,234, rest " in seen.line()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_what_the_allocator_gave_out() -> None:
    with recording("cuda") as seen, phase("large"):
        torch.ones(LARGE * MIB // 4, device="cuda")
    assert seen.facts["peak_memory_large"] >= LARGE
    assert seen.facts["peak_reserved_large"] >= seen.facts["peak_memory_large"]
