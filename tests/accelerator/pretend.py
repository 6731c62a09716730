"""An accelerator written in Python: tensors on `npu:0` that compute on the CPU and behave as those of a GPU do.

It refuses what CUDA refuses (two devices in one operation, a CPU generator, `.numpy()`), and counts every time the host
reads a number back: `item`, `tolist`, `bool`, `nonzero`, an index by a mask, a copy to the CPU. torch loads it by the
entry point beside this file wherever this folder is on PYTHONPATH, so also in the kernels that papermill starts.
"""

import contextlib
import functools
import weakref
from collections import Counter

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "npu"
READS: Counter = Counter()  # what made the host wait, and how often
_LIBRARY: list = []  # keeps the registration alive
_STATE: list = []  # the state of the device's own global generator


class Elsewhere(torch.Tensor):
    "A tensor on the device; `inner` is where its numbers are."

    __module__ = "torch"  # foolbox asks whose a tensor is by the name of its module

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=f"{NAME}:0"
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return _compute(op, *args, **kwargs or {})

    def numpy(self, **_):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, spec):
        return format(self.item(), spec) if self.ndim == 0 else super().__format__(spec)

    def __array__(self, *_):
        return self.numpy()

    def __reduce_ex__(self, protocol):
        return self.cpu().__reduce_ex__(protocol)

    def __getitem__(self, index):
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index, value):
        super().__setitem__(_without_lists(index), value)

    def new_tensor(self, data, **options):
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device} | options)

    def __repr__(self, **_):
        return f"{NAME}({self.inner!r})"


def _without_lists(index):
    "An index with tensors of the CPU instead of lists: torch would look for a kernel of this device to make them with."
    if isinstance(index, tuple):
        return tuple(map(_without_lists, index))
    return torch.tensor(index) if isinstance(index, list) else index


_Generator = torch.Generator
_OWN: set = set()  # addresses of the generators that live on the device


class _AnyGenerator(type(torch.Generator)):
    def __instancecheck__(cls, value):
        return isinstance(value, _Generator)


class Generator(_Generator, metaclass=_AnyGenerator):
    "`torch.Generator`, which may live on the device; its numbers come from the CPU all the same."

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu" if _is_here(device) else device)
        made.here = _is_here(device)
        if made.here:
            _OWN.add(made._cdata)
            weakref.finalize(made, _OWN.discard, made._cdata)
        return made

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self):
        return torch.device(f"{NAME}:0") if self.here else super().device


def _is_here(device: object) -> bool:
    return device is not None and torch.device(device).type == NAME


def _inner(value):
    if isinstance(value, Elsewhere):
        return value.inner
    return type(value)(map(_inner, value)) if type(value) in (list, tuple) else value


def _outer(value, owners: dict):
    "The same with tensors of the device; what an operation changes in place comes back as the tensor it was."
    if isinstance(value, torch.Tensor):
        if isinstance(value, Elsewhere):
            return value
        return owners[id(value)] if id(value) in owners else Elsewhere(value)
    return type(value)(_outer(v, owners) for v in value) if type(value) in (list, tuple) else value


def _masks(indices) -> bool:
    return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


ALWAYS = {
    "_local_scalar_dense": "item",
    "nonzero": "nonzero",
    "masked_select": "mask",
    "equal": "equal",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "bincount": "bincount",
    "histc": "histc",
}
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
COPIES = ("copy_", "_to_copy")


def _reason(name: str, args: tuple) -> str | None:
    "Why the host has to wait for this operation; None: it does not."
    if name in ALWAYS:
        return ALWAYS[name]
    if name == "repeat_interleave" and len(args) == 1:
        return "repeat_interleave"
    if name in INDEXED and _masks(args[1]):
        fills = name != "index" and len(args) > 2 and args[2].numel() == 1 and len(args[1]) == 1
        return None if fills else "mask"
    into_the_host = name == "copy_" and isinstance(args[1], Elsewhere) and not isinstance(args[0], Elsewhere)
    return "copy" if into_the_host else None


def _tensors(values):
    "The tensors among the arguments of an operation."
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _refuse(name: str, args: tuple, kwargs: dict) -> None:
    "Raise where CUDA would: tensors of two devices, or a generator of another device."
    if name in COPIES:
        return
    looked_at = (args[0], *args[2:]) if name in INDEXED and isinstance(args[0], Elsewhere) else args
    for tensor in _tensors((*looked_at, *kwargs.values())):
        if not isinstance(tensor, Elsewhere) and tensor.ndim:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{NAME}:0 and {tensor.device}! (when checking {name})"
            )
    for value in (*args, *kwargs.values()):
        if isinstance(value, _Generator) and value._cdata not in _OWN:
            raise RuntimeError(
                f"Expected a '{NAME}' device type for generator but found '{value.device.type}'"
            )


@contextlib.contextmanager
def _own_generator():
    "The device's global random numbers instead of the CPU's."
    before = torch.get_rng_state()
    torch.set_rng_state(_STATE[0])
    try:
        yield
    finally:
        _STATE[0] = torch.get_rng_state()
        torch.set_rng_state(before)


@functools.cache
def _facts(op) -> tuple[str, bool]:
    "The name of an operation, and whether it draws random numbers."
    return op._schema.name.partition("::")[2], torch.Tag.nondeterministic_seeded in op.tags


def _compute(op, *args, **kwargs):
    "Unwrap, compute on the CPU, wrap."
    name, random = _facts(op)
    _refuse(name, args, kwargs)
    if reason := _reason(name, args):
        READS[reason] += 1
    owners = {id(t.inner): t for t in _tensors((*args, *kwargs.values())) if isinstance(t, Elsewhere)}
    stays = True
    if kwargs.get("device") is not None:
        stays = _is_here(kwargs["device"])
        if name == "_to_copy" and not stays:
            READS["copy"] += 1
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    if name == "copy_" and not isinstance(args[0], Elsewhere):
        return args[0].copy_(args[1].inner)
    args, kwargs = _inner(args), {k: _inner(v) for k, v in kwargs.items()}
    with _own_generator() if random else contextlib.nullcontext():
        result = op(*args, **kwargs)
    for tensor in owners.values():
        if tensor.size() != tensor.inner.size():  # it has grown or been squeezed in place
            tensor.data = Elsewhere(tensor.inner)
    return _outer(result, owners) if stays else result


class _Module(torch.utils.backend_registration._DummyBackendModule):
    "What `torch.npu` is."

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def _lazy_init(self):
        return None

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def manual_seed_all(self, seed):
        _STATE[:] = [torch.Generator().manual_seed(seed).get_state()]

    manual_seed = manual_seed_all

    def get_rng_state(self, device=0):
        return _STATE[0].clone()

    def set_rng_state(self, state, device=0):
        _STATE[0] = state.clone()

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device=0):
        return None


def _detour(make):
    "`torch.tensor` and its like go by way of the CPU."

    def made(data, *args, device=None, **options):
        if not _is_here(device):
            return (
                make(data, *args, device=device, **options)
                if device is not None
                else make(data, *args, **options)
            )
        grad = options.pop("requires_grad", False)
        return make(data, *args, **options).to(device).requires_grad_(grad)

    return made


def register() -> None:
    "Make torch know the device; called by torch itself at the end of `import torch`, and harmless a second time."
    if _LIBRARY:
        return
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(_compute, "PrivateUse1")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _LIBRARY.append(library)
    _STATE[:] = [torch.Generator().manual_seed(0).get_state()]
    torch.__future__.set_overwrite_module_params_on_conversion(
        True
    )  # an assignment to `.data` leaves `inner` behind
    torch.Generator = Generator
    torch.tensor, torch.as_tensor = _detour(torch.tensor), _detour(torch.as_tensor)


@contextlib.contextmanager
def reads():
    "A counter that holds, at the end of the block, what the host read inside it."
    before, found = READS.copy(), Counter()
    try:
        yield found
    finally:
        found.update(READS - before)
