"""A GPU that is not there: shapes, dtypes and devices as on `cuda:0`, no values.

What is on the CPU is computed for real. What is on `cuda:0` is a `FakeTensor`: the kernels' rules
hold (an operation that mixes it with a CPU tensor fails as it would there), nothing is computed.
Where the host must wait for a value of the device it gets a made-up one, and the place is counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_stack
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parent.parent.parent
OURS = tuple(str(ROOT / room) + "/" for room in ("perfusion", "host", "nodes"))
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
# Between a line that asks for a value and the operation that has none.
PASSED_THROUGH = (str(Path(__file__).parent), str(Path(torch.__file__).parent), "<")
HELPERS = ("comfy/model_management.py", "comfy/model_sampling.py")
ELSEWHERE = "ComfyUI"
# The host waits for these whatever the device's tensors hold, for the shape hangs on values.
SHAPED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}


# What is asked of a driver, answered: much memory, none of it in use.
DRIVER = {
    "_lazy_init": lambda: None,
    "synchronize": lambda device=None: None,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "empty_cache": lambda: None,
    "ipc_collect": lambda: None,
    "memory_stats": lambda device=None: Counter(),
    "mem_get_info": lambda device=None: (64 * 2**30, 80 * 2**30),
}


class FakeGpu(TorchDispatchMode):
    """Within it `cuda:0` exists. `waits` counts where the host waited for it, `uploads` copies."""

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: Counter[tuple[str, str]] = Counter()
        self.uploads: Counter[tuple[str, str]] = Counter()

    def __enter__(self):
        # Nothing of a driver is needed where nothing is computed.
        self._patches = [mock.patch.object(torch.cuda, *patch) for patch in DRIVER.items()]
        self._patches.append(mock.patch.object(torch.nn.Module, "_apply", _apply))
        for patch in self._patches:
            patch.start()
        # Else `torch.tensor(..., device="cuda")` asks a driver before any mode hears of it.
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *failure):
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        super().__exit__(*failure)
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat, _ = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        on_device = [value for value in tensors if isinstance(value, FakeTensor)]
        if not on_device and not any(_is_device(value) for value in flat):
            return func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if torch.is_inference_mode_enabled() and func._can_decompose():
            # Outside of it autograd has taken these apart before they come here.
            with _as_before(self):
                return func.decompose(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self._count(self.waits, func)
            return _made_up_number(args[0].dtype)
        if func is aten.equal.default:
            self._count(self.waits, func)
            return True
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self._count(self.waits, func)
            return args[0]
        if func in INDEXING:
            masks = [each for each in args[1] if isinstance(each, FakeTensor)]
            if any(mask.dtype in (torch.bool, torch.uint8) for mask in masks):
                self._count(self.waits, func)
                args = (args[0], [_whole(each) for each in args[1]], *args[2:])
        elif func in SHAPED_BY_VALUES:
            self._count(self.waits, func)
        if any(not isinstance(value, FakeTensor) and value.dim() for value in tensors):
            self._count(self.uploads, func)
        with self._fake:
            args, kwargs = tree_map(_without_values, (args, kwargs))
            found = func(*args, **kwargs)
        return tree_map(lambda value: self._brought_back(func, value), found)

    def of(self, module: torch.nn.Module) -> torch.nn.Module:
        """Check that a module made within is on the device, buffers included."""
        stray = [n for n, p in module.named_parameters() if not isinstance(p, FakeTensor)]
        assert not stray, f"on the CPU: {stray[:3]}"
        return module

    def _brought_back(self, func, value):
        """A result that lies on the CPU is there for good, with made-up values."""
        if not isinstance(value, FakeTensor) or value.device.type != "cpu":
            return value
        self._count(self.waits, func)
        number = _made_up_number(value.dtype)
        return torch.full(value.shape, number, dtype=value.dtype)

    def _count(self, counter: Counter[tuple[str, str]], func) -> None:
        counter[_place(), func.__name__.removesuffix(".default")] += 1


def _place() -> str:
    """The line of this pack that asked, or `ELSEWHERE` for one of ComfyUI itself."""
    for frame, _ in walk_stack(sys._getframe(2)):
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            return f"{Path(file).relative_to(ROOT).as_posix()}:{frame.f_code.co_name}"
        if not file.startswith(PASSED_THROUGH) and not file.endswith(HELPERS):
            break
    return ELSEWHERE


_module_apply = torch.nn.Module._apply


def _apply(module: torch.nn.Module, function, recurse: bool = True) -> torch.nn.Module:
    """`module.to` and its like, except of what lies on the device: it is as it was made there."""
    for child in module.children() if recurse else ():
        _apply(child, function)
    if any(isinstance(each, FakeTensor) for each in module.parameters(recurse=False)):
        return module
    return _module_apply(module, function, recurse=False)


@contextmanager
def _as_before(mode: FakeGpu):
    TorchDispatchMode.__enter__(mode)
    try:
        yield
    finally:
        TorchDispatchMode.__exit__(mode, None, None, None)


def _without_values(value):
    """A tensor of the CPU as the device's operations see it: they must not compute with it."""
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


def _is_device(value) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"


def _made_up_number(dtype: torch.dtype):
    """A half: positive, at most 1, and a matrix of it is a covariance."""
    if dtype is torch.bool:
        return True
    return 0.5 if dtype.is_floating_point else 1


def _whole(index):
    """A mask as if all of it were true."""
    if index is None or index.dtype is not torch.bool:
        return index
    return index.new_zeros(index.numel(), dtype=torch.int64)
