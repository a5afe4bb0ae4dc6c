"""Memory without memory: models whose tensors have shapes and no storage, and a count of what they would hold.

    with weightless() as plan:
        model = plan.causal_lm(config, "float32")     # no weight is read, none is allocated
        with plan.live.phase("update"):
            model(...).loss.backward()                # the real code; small real tensors (ids, masks) may take part
    plan.live.peaks                                   # bytes by phase

The count is of tensor storage: what an allocator is asked for at once, without its own overhead, without buffers inside
of kernels, and without the process itself. `LiveTensors` counts real tensors in the same way; `Heap` is the overhead of
a CPU's allocator.
"""

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from direct_rlhf.models.loading import add_lora, zero_dropout
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.models.sizes import nf4_bytes
from direct_rlhf.recipe.schema import LoraSection

ALIGNMENT = 64  # of a tensor's bytes on a CPU
IS_MAPPED = 2  # bit of glibc's chunk header: the block has pages of its own
_LAYOUTS = {"mkl::_mkl_reorder_linear_weight", "mkldnn::_reorder_linear_weight"}  # copies that no fake tensor knows
_aten = torch.ops.aten
_NUMBERS = {_aten._local_scalar_dense.default, _aten.item.default, _aten.is_nonzero.default}


class Heap:
    """How far glibc's heap would grow: every block is asked for, none is touched, so that only addresses are spent.

    glibc keeps most of what it was once given, and blocks that lie between others in use are lost for larger ones: a
    CPU run needs up to half as much again as its tensors hold.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self._allocate, self._free, self._break = libc.posix_memalign, libc.free, libc.sbrk
        self._free.argtypes, self._free.restype = [ctypes.c_void_p], None
        self._break.argtypes, self._break.restype = [ctypes.c_ssize_t], ctypes.c_void_p
        self._allocate.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self._info = libc.mallinfo2
        self._info.restype = _MallocInfo
        self._blocks: dict[int, tuple[int | None, int]] = {}  # address and bytes of their own pages
        self._mapped = 0
        self._end = int(self._break(0))
        self._start = self._end - self.room()

    @staticmethod
    def here() -> bool:
        """Whether this process allocates with glibc."""
        return hasattr(ctypes.CDLL(None), "mallinfo2")

    def room(self) -> int:
        """Bytes inside of the heap that are free now."""
        return int(self._info().fordblks)

    @property
    def grown(self) -> int:
        """Bytes that the process has more than at the start, beside what was free inside of it then.

        Blocks with pages of their own go back to the system; the heap's end does not, as some small object of the
        program's always lies there.
        """
        self._end = max(self._end, int(self._break(0)))
        return self._mapped + self._end - self._start

    def take(self, place: int, size: int) -> None:
        found = ctypes.c_void_p()
        if self._allocate(ctypes.byref(found), ALIGNMENT, max(size, 1)) or found.value is None:
            self._blocks[place] = None, size  # more than there are addresses: it would have pages of its own
            self._mapped += size
            return
        header = ctypes.c_size_t.from_address(found.value - ctypes.sizeof(ctypes.c_size_t)).value
        own = size if header & IS_MAPPED else 0
        self._blocks[place] = found.value, own
        self._mapped += own

    def give(self, place: int) -> None:
        address, own = self._blocks.pop(place)
        self._mapped -= own
        if address is not None:
            self._free(address)


class _MallocInfo(ctypes.Structure):
    """struct mallinfo2."""

    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


class LiveTensors(TorchDispatchMode):
    """While it is on: the bytes of all tensors made since and still alive (``now``), and their peak by phase.

    A number read from a weightless tensor is 1, and a truth is True; but `any`, which looks for faults, finds none.
    ``heap``, if it is given, is asked for each of the tensors, and ``grown`` has its peak by phase.
    """

    def __init__(self, heap: Heap | None = None, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.now = 0
        self.peaks: dict[str, int] = {}
        self.grown: dict[str, int] = {}
        self._heap = heap
        self._phase: str | None = None
        self._alive: dict[int, Any] = {}  # storage to the weak reference that tells of its end
        self._false: set[int] = set()  # storages of what `any` found

    def count(self, *tensors: Tensor) -> None:
        """Counts tensors that were there before; each storage once, however many tensors share it."""
        for tensor in tensors:
            if tensor.device.type == "meta":  # only a shape
                continue
            if tensor.is_mkldnn:  # no storage of its own
                self._hold(tensor, id(tensor), tensor.numel() * tensor.element_size())
                continue
            storage = tensor.untyped_storage()
            self._hold(storage, storage._cdata, storage.nbytes())

    def _hold(self, held: Any, place: int, size: int) -> None:
        if place in self._alive:
            return
        self._alive[place] = weakref.ref(held, self._ends(place, size))
        self.now += size
        if self._heap is not None:
            self._heap.take(place, size)
        self._look()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The highest count inside is the peak of ``name`` (at least what it was before)."""
        self._phase = name
        self._look()
        try:
            yield
        finally:
            self._phase = None

    def _laid_out(self, func: Any, weight: Tensor, *rest: Any) -> Tensor:
        """A copy of a weight in the order that a CPU's matrix product likes best; a GPU has no such copy.

        It counts as the weight does: the library takes a larger block, and leaves the rest of it untouched.
        """
        if not isinstance(weight, FakeTensor):
            found: Tensor = func(weight, *rest)
            self._hold(found, id(found), weight.nbytes)
            return found
        if self.device != "cpu":
            return weight
        found = torch.empty_like(weight)
        self.count(found)
        return found

    def _ends(self, place: int, size: int) -> Callable[[Any], None]:
        def end(_: Any) -> None:
            del self._alive[place]
            self._false.discard(place)
            self.now -= size
            if self._heap is not None:
                self._heap.give(place)

        return end

    def _look(self) -> None:
        name = self._phase
        if name is None:
            return
        self.peaks[name] = max(self.peaks.get(name, 0), self.now)
        if self._heap is not None:
            self.grown[name] = max(self.grown.get(name, 0), self._heap.grown)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _NUMBERS and isinstance(args[0], FakeTensor):
            if args[0].dtype is torch.bool:
                return args[0].untyped_storage()._cdata not in self._false
            return 1.0 if args[0].is_floating_point() else 1
        if func._schema.name in _LAYOUTS:
            return self._laid_out(func, *args)
        found = func(*args, **(kwargs or {}))
        if func is _aten.any.default:
            self._false.add(found.untyped_storage()._cdata)
        self.count(*(leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)))
        return found


class Weightless:
    """Makes models without storage; ``live`` counts what they would hold."""

    def __init__(self, heap: Heap | None = None, device: str = "cpu") -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = LiveTensors(heap, device)

    def causal_lm(
        self,
        config: Any,
        dtype: str,
        lora: LoraSection | None = None,
        adapters: Sequence[str] = (),
        quantise: str = "none",
    ) -> Any:
        """What `models.loading` would make of a transformers config: a causal LM, or one under LoRA adapters."""
        from transformers import AutoModelForCausalLM

        zero_dropout(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
            if quantise != "none":
                _in_four_bits(model)
            for name in adapters:
                assert lora is not None
                model = add_lora(model, lora, name)
        self._place(model)
        return model

    @contextmanager
    def making(self) -> Iterator[None]:
        """Every tensor that is made inside is weightless, also if it is made of nothing or of real ones."""
        with self.mode, self.live:  # the counting mode once more, above the other one
            yield

    def scalar(self, model: Any) -> ScalarModel:
        """A critic or reward model on the trunk of ``model``."""
        with self.making():
            return ScalarModel.zero(model)

    def _place(self, model: nn.Module) -> None:
        """Moves a model from the meta device, where nothing is counted; tensors that were shared stay so."""
        placed: dict[int, Tensor] = {}
        for module in model.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None:
                    continue
                if id(tensor) not in placed:
                    fake = self.like(tensor)
                    shell = isinstance(tensor, nn.Parameter)
                    placed[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if shell else fake
                home: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
                home[name] = placed[id(tensor)]

    def like(self, parameter: Tensor) -> Tensor:
        """An uninitialised tensor of the same shape and type."""
        with self.mode:
            return torch.empty_like(parameter, device="cpu")

    def gradients(self, parameters: list[nn.Parameter]) -> None:
        """Gives each parameter a gradient."""
        for parameter in parameters:
            parameter.grad = self.like(parameter)


class _FourBits(nn.Linear):
    """Stands for bitsandbytes' Linear4bit: a packed weight that is made whole for each product, in both passes."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False, device="meta")
        self.computed_in = like.weight.dtype
        packed = -(-like.weight.numel() // 2)
        scales = nf4_bytes(like.weight.numel()) - packed
        self.weight = nn.Parameter(torch.empty(packed, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(scales, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = like.bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (as in torch)
        found: Tensor = _FourBitProduct.apply(input.to(self.computed_in), self.out_features)
        return (found if self.bias is None else found + self.bias).to(input.dtype)


class _FourBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n_out: int) -> Tensor:
        ctx.size = n_out, x.shape[-1]
        return x @ x.new_empty(ctx.size).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(ctx.size), None


def _in_four_bits(model: Any) -> None:
    """The model's linear layers, but its head, as bitsandbytes would store them."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child is not head:
                setattr(module, name, _FourBits(child))


@contextmanager
def weightless(heap: Heap | None = None, device: str = "cpu") -> Iterator[Weightless]:
    """Everything that is computed inside on the models it makes is counted, as if on ``device``, and not computed."""
    with suppress(ImportError):  # PEFT imports it, where it is installed; its tables are none of the model's
        import bitsandbytes  # noqa: F401
    plan = Weightless(heap, device)
    with plan.live:
        yield plan


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of a module's distinct parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
