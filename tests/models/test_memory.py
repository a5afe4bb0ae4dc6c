"""Out of memory: half the chunk from then on, the same result, one line that says so, and a floor."""

import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from direct_rlhf.errors import OutOfMemoryError
from direct_rlhf.models.memory import ChunkSize

DATA = torch.arange(24, dtype=torch.float64)
CPU_ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: {}: you tried to allocate 64 bytes."


class Machine:
    """Squares a tensor in chunks, and has memory for ``room`` numbers at once; remembers the sizes it was given."""

    def __init__(self, room, error=None):
        self.room, self.sizes = room, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 is full")

    def __call__(self, size):
        self.sizes.append(size)
        return torch.cat([self.square(part) for part in DATA.split(size)])

    def square(self, part):
        if len(part) > self.room:
            raise self.error
        return part**2


@pytest.mark.promise("R3")
@settings(max_examples=25, deadline=None)  # a halving collects garbage, which takes 0.1 s
@given(size=st.integers(1, 100), room=st.integers(1, 30))
def test_a_chunk_that_is_too_large_is_halved_until_it_fits_and_the_result_is_the_same(size, room):
    machine, said = Machine(room), []
    chunk = ChunkSize("scoring", size, said.append)
    assert torch.equal(chunk.run(machine), DATA**2)
    fits = min(chunk.size, len(DATA)) <= room
    assert fits
    assert chunk.halvings == len(said) == len(machine.sizes) - 1
    assert machine.sizes == [size >> step for step in range(chunk.halvings + 1)]
    assert chunk.halvings == 0 or min(machine.sizes[-2], len(DATA)) > room  # no further than needed


@pytest.mark.promise("R3")
def test_each_halving_is_said_once_and_lasts():
    said = []
    chunk = ChunkSize("held-out evaluation", 12, said.append)
    chunk.run(Machine(3))
    assert said == [
        "held-out evaluation: out of memory; the chunk is 6 instead of 12 from now on. Results do not change.",
        "held-out evaluation: out of memory; the chunk is 3 instead of 6 from now on. Results do not change.",
    ]
    later = Machine(24)
    chunk.run(later)
    assert later.sizes == [3]
    assert len(said) == 2


@pytest.mark.promise("R3")
def test_phases_have_counters_of_their_own():
    sampling, update = ChunkSize("sampling", 16, lambda text: None), ChunkSize("update", 16, lambda text: None)
    sampling.run(Machine(2))
    update.run(Machine(24))
    assert (sampling.size, sampling.halvings) == (2, 3)
    assert (update.size, update.halvings) == (16, 0)


@pytest.mark.promise("R3")
def test_at_the_floor_the_run_ends_with_code_4_and_says_what_to_do():
    machine = Machine(0)
    chunk = ChunkSize("PPO (direct_ppo), scoring", 5, lambda text: None)
    with pytest.raises(OutOfMemoryError) as caught:
        chunk.run(machine)
    assert machine.sizes == [5, 2, 1]
    assert caught.value.exit_code == 4
    assert str(caught.value).startswith(
        "PPO (direct_ppo), scoring: out of memory even with a chunk of 1 (CUDA out of memory. Tried to allocate 2.00 GiB). "
        "Shorten prompts and answers (data.max_prompt_tokens,"
    )
    assert caught.value.__context__ is None  # it would hold the failed call's tensors


@pytest.mark.promise("R3")
def test_a_fixed_chunk_ends_the_run_with_code_4_and_says_what_to_change():
    machine = Machine(room=1)
    with pytest.raises(
        OutOfMemoryError, match=r"update: out of memory with 8 padded slots at once .*more processes"
    ) as caught:
        ChunkSize("update", 8, fixed=True).run(machine)
    assert caught.value.exit_code == 4
    assert machine.sizes == [8]


def test_the_tensors_of_the_failed_call_are_gone_before_the_next_one():
    held, alive = [], []

    def work(size):
        alive.append([reference() is not None for reference in held])
        activations = torch.zeros(size)
        held.append(weakref.ref(activations))
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return size

    assert ChunkSize("update", 8, lambda text: None).run(work) == 2
    assert alive == [[], [False], [False, False]]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(CPU_ALLOCATOR.format("can't allocate memory")),
        RuntimeError(CPU_ALLOCATOR.format("not enough memory")),
        MemoryError("Unable to allocate 128. GiB for an array with shape (17179869184,)"),
        MemoryError(),
    ],
)
def test_memory_of_the_host_counts_as_well(error):
    chunk = ChunkSize("scoring", 24, lambda text: None)
    assert torch.equal(chunk.run(Machine(12, error)), DATA**2)
    assert chunk.halvings == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("can't allocate memory"),
        OutOfMemoryError("inner: out of memory even with a chunk of 1 (DefaultCPUAllocator: can't allocate memory)."),
    ],
    ids=["another fault", "another class", "our own, of a chunk inside"],
)
def test_any_other_error_passes_at_once(error):
    machine, chunk = Machine(3, error), ChunkSize("scoring", 24)
    with pytest.raises(type(error)) as caught:
        chunk.run(machine)
    assert caught.value is error
    assert (machine.sizes, chunk.halvings) == ([24], 0)


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="sampling: a chunk holds at least 1, got 0"):
        ChunkSize("sampling", 0)


def test_the_line_goes_to_the_log_where_nobody_else_takes_it(caplog):
    ChunkSize("scoring", 24).run(Machine(12))
    assert [(record.levelname, record.message.split(";")[0]) for record in caplog.records] == [
        ("WARNING", "scoring: out of memory")
    ]


REAL = """
import resource, torch
from direct_rlhf.models.memory import ChunkSize

def work(size):  # 16 rows of 2**27 bytes each
    return sum(len(torch.empty((min(size, 16 - start), 2**27), dtype=torch.uint8)) for start in range(0, 16, size))

torch.set_num_threads(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
chunk = ChunkSize("rows", 16, print)
print(work(1) == 16, chunk.run(work), chunk.halvings)
"""


@pytest.mark.promise("R3")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its own memory as Linux does")
def test_a_process_that_really_runs_out_of_memory_goes_on():
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, check=True, timeout=120)
    *said, result = done.stdout.splitlines()
    assert said
    assert all(line.startswith("rows: out of memory; the chunk is ") for line in said)
    assert result == f"True 16 {len(said)}"
