"""A model as one flat float32 vector: torch modules, dictionaries of numpy arrays, scikit-learn's linear models.

Each class knows its framework; who trains with it sees vectors only.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from pipeline import Tensor
from pipeline.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

__all__ = ["Arrays", "Estimator", "OneArray", "Parameters", "TorchModule", "parameters_of"]

Vector = npt.NDArray[np.float32]


class Parameters(Protocol):
    """What a mode needs of a model. Vectors are float32 [size]."""

    size: int
    matrices: dict[int, tuple[int, int]]
    """Offset → shape of what is a matrix (further dimensions flattened)."""

    @property
    def device(self) -> str:
        """Where they are, as torch names it."""

    def read(self) -> Vector:
        """A copy of all parameters."""

    def write(self, vector: Vector) -> None: ...

    def gradient(self, given: Any) -> Vector:
        """A copy of the gradients, which are then zero; `given` is what the caller of step() passed."""

    def apply(self, gradient: Vector, optimizer: Any) -> None:
        """One step of the caller's optimizer."""

    def step(self, given: Any, optimizer: Any) -> None:
        """One step by this worker's own gradients."""

    def state(self, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of everything: tensors by name, and what is no tensor."""

    def load(self, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        """The parameters of a state."""

    def load_optimizer(self, optimizer: Any, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None: ...

    def share(self, path: Path) -> None:
        """From now on the parameters are what the file holds: float32 [size], shared with other processes."""

    def unshare(self) -> None: ...


def parameters_of(model: Any) -> Parameters:
    """Raises ConfigurationError for what is none of the three."""
    if "torch" in sys.modules:
        import torch

        if isinstance(model, torch.nn.Module):
            return TorchModule(model)
    if isinstance(model, np.ndarray):
        return OneArray(model)
    if isinstance(model, MutableMapping):
        return Arrays(model)
    if hasattr(model, "partial_fit"):
        return Estimator(model)
    raise ConfigurationError(
        f"a {type(model).__name__} cannot be trained; pass a torch module, a dictionary of float arrays, or a "
        "scikit-learn estimator with partial_fit and coefficients"
    )


def _matrices(shapes: Iterable[tuple[int, ...]]) -> dict[int, tuple[int, int]]:
    found: dict[int, tuple[int, int]] = {}
    at = 0
    for shape in shapes:
        size = int(np.prod(shape))
        if len(shape) > 1 and size:
            found[at] = (shape[0], size // shape[0])
        at += size
    return found


class TorchModule:
    """Trainable parameters in `named_parameters` order, of any float dtype and device; a complex one is two floats.

    Extra state of the module (`get_extra_state`) is a tensor, or what JSON gives back as it was.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        import torch

        self._torch = torch
        self._model = model
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self._parameters:
            raise ConfigurationError("the model has no parameter that requires a gradient")
        self._shapes = [tuple(self._real(parameter).shape) for parameter in self._parameters]
        self._sizes = [int(np.prod(shape)) for shape in self._shapes]
        self.size = sum(self._sizes)
        self.matrices = _matrices(self._shapes)

    @property
    def device(self) -> str:
        """The first one's; a model may be spread over several."""
        return str(self._parameters[0].device)

    def _real(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of floats: complex [...] as [..., 2]."""
        detached = tensor.detach()
        return self._torch.view_as_real(detached.resolve_conj()) if detached.is_complex() else detached

    def _flat(self) -> torch.Tensor:
        """Whatever torch's default dtype and device are."""
        return self._torch.empty(self.size, dtype=self._torch.float32, device="cpu")

    def _pieces(self, vector: Vector) -> Iterable[tuple[torch.nn.Parameter, torch.Tensor]]:
        yield from self._views(self._torch.as_tensor(Tensor(vector), device="cpu"))

    def _views(self, flat: torch.Tensor) -> Iterable[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Each parameter and its piece of the flat tensor, in its shape as floats."""
        at = 0
        for parameter, shape, size in zip(self._parameters, self._shapes, self._sizes, strict=True):
            yield parameter, flat[at : at + size].view(shape)
            at += size

    def read(self) -> Vector:
        flat = self._flat()
        for parameter, piece in self._views(flat):
            piece.copy_(self._real(parameter))
        return cast(Vector, flat.numpy())

    def write(self, vector: Vector) -> None:
        with self._torch.no_grad():
            for parameter, piece in self._pieces(vector):
                self._real(parameter).copy_(piece)

    def gradient(self, given: Any) -> Vector:
        flat = self._flat()
        for parameter, piece in self._views(flat):
            if parameter.grad is None:
                piece.zero_()
            else:
                grad = parameter.grad
                piece.copy_(self._real(grad if grad.layout == self._torch.strided else grad.to_dense()))
                parameter.grad = None
        return cast(Vector, flat.numpy())

    def apply(self, gradient: Vector, optimizer: Any) -> None:
        for parameter, piece in self._pieces(gradient):
            own = self._torch.view_as_complex(piece.clone()) if parameter.is_complex() else piece
            parameter.grad = own.to(parameter.dtype, copy=True).to(parameter.device)
        self.step(None, optimizer)

    def step(self, given: Any, optimizer: Any) -> None:
        optimizer.step()
        optimizer.zero_grad()

    def state(self, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, extra = {}, {}
        for name, value in self._model.state_dict().items():
            if isinstance(value, self._torch.Tensor):
                tensors[f"model.{name}"] = Tensor(value.detach().clone())
            else:
                extra[name] = _checked_extra(name, value)
        note = {"extra": extra} if extra else {}
        if optimizer is None:
            return tensors, note
        saved = optimizer.state_dict()
        numbers: dict[str, Any] = {}
        for index, entries in saved["state"].items():
            for key, value in entries.items():
                if isinstance(value, self._torch.Tensor):
                    tensors[f"optimizer.{index}.{key}"] = Tensor(value.detach().clone())
                else:
                    numbers[f"{index}.{key}"] = value
        note["optimizer"] = {"groups": _plain(saved["param_groups"]), "numbers": _plain(numbers)}
        return tensors, note

    def load(self, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        torch = self._torch
        if "values" in tensors:
            self.write(np.asarray(tensors["values"]))
            return
        found = {name[6:]: torch.as_tensor(t).clone() for name, t in tensors.items() if name.startswith("model.")}
        found |= note.get("extra", {})
        try:
            self._model.load_state_dict(found)
        except RuntimeError as error:
            raise ConfigurationError(f"the run's model is another one: {error}") from None

    def load_optimizer(self, optimizer: Any, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        saved = note.get("optimizer")
        if saved is None:
            return
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                index, _, key = rest.partition(".")
                state.setdefault(int(index), {})[key] = self._torch.as_tensor(tensor).clone()
        for name, number in saved["numbers"].items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = number
        groups = optimizer.state_dict()["param_groups"]
        for group, loaded in zip(groups, saved["groups"], strict=False):
            group.update({key: self._option(group.get(key), value) for key, value in loaded.items() if key != "params"})
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _option(self, own: Any, loaded: Any) -> Any:
        """What JSON made a list or a number, as what this worker's optimizer has there: a tuple, a tensor."""
        if isinstance(own, self._torch.Tensor):
            return self._torch.as_tensor(loaded, dtype=own.dtype, device=own.device)
        return tuple(loaded) if isinstance(loaded, list) else loaded

    def share(self, path: Path) -> None:
        flat = self._torch.from_file(str(path), shared=True, size=self.size, dtype=self._torch.float32, device="cpu")
        for parameter, piece in self._views(flat):
            if parameter.dtype != self._torch.float32 or parameter.device.type != "cpu":
                raise ConfigurationError("mode hogwild shares float32 parameters in a CPU's memory")
            parameter.data = piece

    def unshare(self) -> None:
        for parameter in self._parameters:
            parameter.data = parameter.data.clone()


class Arrays:
    """A dictionary of float arrays, changed in place. `step(optimizer, gradients=…)`: a dictionary of the same names.

    The optimizer is any callable `(parameters, gradients) -> None` that changes the parameters' arrays.
    """

    def __init__(self, arrays: MutableMapping[str, npt.NDArray[Any]]) -> None:
        self._arrays = arrays
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
                raise ConfigurationError(f"parameter {name!r} is no float array but {array!r:.80}")
        self._names = list(arrays)
        self._private: dict[str, npt.NDArray[Any]] = {}
        """The caller's arrays, while others are shared."""
        self.size = sum(array.size for array in arrays.values())
        self.matrices = _matrices(array.shape for array in arrays.values())
        self.device = "cpu"

    def _split(self, vector: Vector) -> dict[str, npt.NDArray[Any]]:
        found, at = {}, 0
        for name in self._names:
            array = self._arrays[name]
            found[name] = vector[at : at + array.size].reshape(array.shape)
            at += array.size
        return found

    def read(self) -> Vector:
        return np.concatenate([np.asarray(self._arrays[name], np.float32).reshape(-1) for name in self._names])

    def write(self, vector: Vector) -> None:
        for name, piece in self._split(vector).items():
            self._arrays[name][...] = piece

    def gradient(self, given: Any) -> Vector:
        self._check(given)
        return np.concatenate([np.asarray(given[name], np.float32).reshape(-1) for name in self._names])

    def _check(self, given: Any) -> None:
        if not isinstance(given, Mapping) or set(given) != set(self._names):
            raise ConfigurationError(f"step(gradients=…) takes a dictionary with {', '.join(self._names)}")

    def apply(self, gradient: Vector, optimizer: Any) -> None:
        optimizer(self._arrays, self._split(np.asarray(gradient)))

    def step(self, given: Any, optimizer: Any) -> None:
        self._check(given)
        optimizer(self._arrays, given)

    def state(self, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {f"model.{name}": Tensor(self._arrays[name].copy()) for name in self._names}, {}

    def load(self, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        if "values" in tensors:
            self.write(np.asarray(tensors["values"]))
            return
        for name in self._names:
            if f"model.{name}" not in tensors or tensors[f"model.{name}"].shape != self._arrays[name].shape:
                raise ConfigurationError(f"the run's model is another one: it has no {name} of that shape")
            self._arrays[name][...] = np.asarray(tensors[f"model.{name}"])

    def load_optimizer(self, optimizer: Any, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        """A callable keeps its own state."""

    def share(self, path: Path) -> None:
        flat = np.memmap(path, np.float32, "r+", shape=(self.size,))
        self._private = {name: self._arrays[name] for name in self._names}
        for name, piece in self._split(flat).items():
            self._arrays[name] = piece

    def unshare(self) -> None:
        """The caller's arrays are back in the dictionary, with what was reached."""
        for name, array in self._private.items():
            array[...] = self._arrays[name]
            self._arrays[name] = array
        self._private = {}


class OneArray(Arrays):
    """A float array, changed in place: `values`."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        super().__init__({"values": array})

    def share(self, path: Path) -> None:
        raise ConfigurationError(
            "mode hogwild cannot share an array that others hold; pass a dictionary, and read its array anew each step"
        )


class Estimator(Arrays):
    """A scikit-learn linear model that has seen `partial_fit` once: `coef_` and `intercept_`. For mode local."""

    def __init__(self, model: Any) -> None:
        _check_linear(model)
        super().__init__({"coef_": model.coef_, "intercept_": np.atleast_1d(model.intercept_)})
        self._model = model

    def read(self) -> Vector:
        self._arrays["coef_"], self._arrays["intercept_"] = self._model.coef_, np.atleast_1d(self._model.intercept_)
        return super().read()

    def write(self, vector: Vector) -> None:
        self.read()
        super().write(vector)
        self._model.intercept_ = self._arrays["intercept_"]

    def share(self, path: Path) -> None:
        raise ConfigurationError("mode hogwild cannot share a scikit-learn model's coefficients; use mode local")


def _checked_extra(name: str, value: Any) -> Any:
    """Raises ConfigurationError for what other workers would not get as it is."""
    with contextlib.suppress(TypeError, ValueError):
        if json.loads(json.dumps(value)) == value:
            return value
    raise ConfigurationError(
        f"the model's {name} cannot travel: what get_extra_state returns is to be a tensor, or what JSON keeps as it is"
    )


def _check_linear(model: Any) -> None:
    """Raises ConfigurationError unless `coef_` and `intercept_` are what partial_fit goes on from."""
    kind = type(model).__name__
    if not (hasattr(model, "coef_") and hasattr(model, "intercept_")):
        raise ConfigurationError(
            f"the {kind} has no coef_ and intercept_: of scikit-learn's models the linear ones can be trained"
            if hasattr(model, "n_features_in_")
            else f"call partial_fit of the {kind} once before join: then it has its coefficients"
        )
    if getattr(model, "average", False):
        raise ConfigurationError(
            f"the {kind} has average={model.average}: partial_fit goes on from weights that it keeps to itself; use "
            "average=False, rounds average too"
        )


def _plain(value: Any) -> Any:
    """Tensors as numbers, and without what JSON does not know."""
    return json.loads(json.dumps(value, default=lambda one: one.tolist() if hasattr(one, "tolist") else None))
