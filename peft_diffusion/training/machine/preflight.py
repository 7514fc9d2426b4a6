"""What a run will take, told before it: its step is traced on tensors that have a shape and no memory."""

import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..need import Need

_BLOCK = 512  # bytes: what CUDA's allocator rounds up to
_BLAS = 4  # handles that hold a workspace each: of cuBLAS and cuBLASLt, in the threads of forward and backward


def predict(
    loss: Callable[[Mapping[str, Tensor]], Tensor],
    inputs: Mapping[str, Tensor],
    modules: Iterable[nn.Module],
    state: Iterable[Tensor],
    device: torch.device,
    records: bool = False,
) -> Need:
    """Predict what a run takes, computing nothing and changing nothing.

    Args:
        loss: What is run forward and backward.
        inputs: Those of the largest batch, on any device.
        modules: All that may be on the device.
        state: The adapter, its gradients and its optimizer.
        device: Where it will run.
        records: Whether steps are recorded, on streams whose products have workspaces of their own.

    Returns:
        Bytes by what needs them.
    """
    own = list(state)
    counted = {_place(tensor) for tensor in own}
    held: dict[int, int] = {}
    away: dict[int, int] = {}
    for tensor in (t for module in modules for t in (*module.parameters(), *module.buffers())):
        if _place(tensor) not in counted:
            (held if tensor.device == device else away)[_place(tensor)] = tensor.untyped_storage().nbytes()
    adapter = {_place(tensor): tensor.untyped_storage().nbytes() for tensor in own}
    beside = _BLAS * _workspace(device) * (2 if records else 1)
    step = peak(lambda given: loss(given).backward(), inputs, device)
    return Need(sum(held.values()), sum(adapter.values()), step + beside, sum(away.values()) + beside, recorded=records)


def peak(work: Callable[[Mapping[str, Tensor]], object], inputs: Mapping[str, Tensor], device: torch.device) -> int:
    """Predict the most bytes that are alive at once, over what was there before; nothing is computed.

    Counted are tensors that operations give back. What a library takes and frees within one operation differs between
    processors and versions and is not counted, such as the copies of a convolution's input that oneDNN makes.

    Args:
        work: What is done.
        inputs: On any device.
        device: Where it will be done.

    Returns:
        Bytes.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    live = _Live(mode)
    # In this thread: the backward pass of a CUDA tensor would run in one that the modes do not reach.
    with mode, torch.autograd.set_multithreading_enabled(False), live:
        given = {name: torch.empty(one.shape, dtype=one.dtype, device=device) for name, one in inputs.items()}
        work(given)
    return live.peak


def room(device: torch.device) -> int | None:
    """Tell how many bytes this process can have on a device, what it has there among them.

    Args:
        device: The device.

    Returns:
        Bytes; None where that cannot be told.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device))
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _workspace(device: torch.device) -> int:
    """Bytes of the workspace that torch gives products of matrices on a device, for each handle and stream."""
    if device.type != "cuda":
        return 0
    return 32 * 2**20 if torch.cuda.get_device_capability(device)[0] == 9 else 8 * 2**20 + 2**16


_CONSTANTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)


class _Live(TorchDispatchMode):
    """Adds up the memory of the tensors that operations make, for as long as they live.

    Args:
        mode: Traces the operations. It is given the weights, which have memory, as tensors without: what an operation gives
            back is looked up only where all it takes is without, and worked out anew otherwise, which takes several times as
            long.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()
        self._like_those: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the first, which stays its own meanwhile

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if func in _CONSTANTS:  # whose numbers the mode keeps, for work that reads them
            made = func(*args, **(kwargs or {}))
        else:
            named = {key: self._without_memory(one) for key, one in (kwargs or {}).items()}
            made = func(*map(self._without_memory, args), **named)
        # What an operation writes into or looks at is there already.
        several = made if isinstance(made, (tuple, list)) else (made,)
        for returned, tensor in zip(func._schema.returns, several, strict=False):
            if returned.alias_info is None:
                for one in tree_leaves(tensor):
                    if isinstance(one, Tensor):
                        self._add(one)
        return made

    def _without_memory(self, given: Any) -> Any:
        """An argument of an operation, its tensors without memory."""
        if isinstance(given, Tensor):
            return given if isinstance(given, FakeTensor) else self._like(given)
        if isinstance(given, (list, tuple)):
            return type(given)(map(self._without_memory, given))
        return given

    def _like(self, given: Tensor) -> Tensor:
        """A tensor without memory that is as one with memory.

        Modes are below autograd, where of a plain weight only what is here counts: to convert all of it takes ten times as
        long.
        """
        kept = self._like_those.get(id(given))
        if kept is None:
            plain = type(given) in (Tensor, nn.Parameter) and given.layout is torch.strided
            plain = plain and given._base is None and not given.is_conj()  # a view has its memory with others
            made = (
                torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
                if plain
                else self._mode.from_tensor(given)
            )
            kept = self._like_those[id(given)] = given, made
        return kept[1]

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
