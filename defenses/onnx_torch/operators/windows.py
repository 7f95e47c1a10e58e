"""Convolution and pooling: whatever slides a window over the spatial axes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from defenses.onnx_torch.node import Node, Operator


@dataclass(frozen=True)
class Window:
    """A window of a node over S spatial axes, with the padding before and after each of them."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, node: Node, size: Sequence[int], kernel: Sequence[int]) -> "Window":
        """Read a node's window for spatial sizes ``size``, resolving ``auto_pad``."""
        rank = len(size)
        strides = tuple(node.get("strides", (1,) * rank))
        dilations = tuple(node.get("dilations", (1,) * rank))
        before, after = _pads(node, size, kernel, strides, dilations)
        return cls(tuple(kernel), strides, dilations, before, after)

    @property
    def reach(self) -> tuple[int, ...]:
        """The extent of the dilated kernel on each axis."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def symmetric(self) -> bool:
        """Whether as much is padded before as after."""
        return self.before == self.after

    def overhang(self, size: Sequence[int], ceil_mode: bool) -> tuple[int, ...]:
        """Return how far the last window reaches past the padding on each axis, when sizes are rounded up."""
        if not ceil_mode:
            return (0,) * len(size)
        over = []
        for extent, reach, stride, before, after in zip(
            size, self.reach, self.strides, self.before, self.after, strict=True
        ):
            steps = -(-(extent + before + after - reach) // stride)
            if steps * stride >= extent + before:  # a window must start inside the input or the padding before it
                steps -= 1
            over.append(max(0, steps * stride + reach - extent - before - after))
        return tuple(over)


def _pads(
    node: Node, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rank, mode = len(size), node.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        pads = node.get("pads", (0,) * (2 * rank))
        return tuple(pads[:rank]), tuple(pads[rank:])
    if mode == "VALID":
        return (0,) * rank, (0,) * rank
    totals = [
        max(0, (-(-extent // stride) - 1) * stride + (k - 1) * dilation + 1 - extent)
        for extent, k, stride, dilation in zip(size, kernel, strides, dilations, strict=True)
    ]
    less, more = tuple(total // 2 for total in totals), tuple(total - total // 2 for total in totals)
    return (less, more) if mode == "SAME_UPPER" else (more, less)


def pad_spatial(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad the last axes of x with a constant; negative amounts crop."""
    if not any(before) and not any(after):
        return x
    amounts = [amount for pair in zip(reversed(before), reversed(after), strict=True) for amount in pair]
    return F.pad(x, amounts, value=value)


_CONVOLUTIONS: Mapping[int, Callable[..., Tensor]] = MappingProxyType({1: F.conv1d, 2: F.conv2d, 3: F.conv3d})
_TRANSPOSED: Mapping[int, Callable[..., Tensor]] = MappingProxyType(
    {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
)
_AVERAGE_POOLS: Mapping[int, Callable[..., Tensor]] = MappingProxyType(
    {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
)
_MAX_POOLS: Mapping[int, Callable[..., Tensor]] = MappingProxyType({1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d})


def convolve(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Conv over one to three spatial axes."""
    window = Window.of(node, x.shape[2:], weight.shape[2:])
    padding = window.before
    if not window.symmetric:
        x, padding = pad_spatial(x, window.before, window.after), (0,) * len(padding)
    convolution = _CONVOLUTIONS[x.ndim - 2]
    return convolution(x, weight, bias, window.strides, padding, window.dilations, node.get("group", 1))


def convolve_transposed(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """ConvTranspose: the whole result first, then cropped by the padding."""
    rank = x.ndim - 2
    strides, dilations = node.get("strides", (1,) * rank), node.get("dilations", (1,) * rank)
    whole = _TRANSPOSED[rank](x, weight, None, strides, 0, 0, node.get("group", 1), dilations)
    extra = node.get("output_padding", (0,) * rank)
    before, after = _crops(node, x.shape[2:], whole.shape[2:], strides, extra)
    y = pad_spatial(whole, [-crop for crop in before], [more - crop for more, crop in zip(extra, after, strict=True)])
    return y if bias is None else y + bias.reshape(-1, *(1,) * rank)


def _crops(
    node: Node, size: Sequence[int], whole: Sequence[int], strides: Sequence[int], extra: Sequence[int]
) -> tuple[Sequence[int], Sequence[int]]:
    rank, mode, wanted = len(size), node.get("auto_pad", "NOTSET"), node.get("output_shape")
    if wanted is None and mode in ("NOTSET", "VALID"):
        pads = node.get("pads", (0,) * (2 * rank)) if mode == "NOTSET" else (0,) * (2 * rank)
        return pads[:rank], pads[rank:]
    if wanted is None:
        wanted = [extent * stride for extent, stride in zip(size, strides, strict=True)]
    totals = [extent + more - want for extent, more, want in zip(whole, extra, wanted[-rank:], strict=True)]
    less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (less, more) if mode == "SAME_UPPER" else (more, less)


def pool_max(node: Node, x: Tensor) -> Tensor:
    """MaxPool, without its indices."""
    size = x.shape[2:]
    window = Window.of(node, size, node.get("kernel_shape"))
    over = window.overhang(size, bool(node.get("ceil_mode", 0)))
    after = [more + hang for more, hang in zip(window.after, over, strict=True)]
    padding: Sequence[int] = window.before
    too_wide = any(2 * pad > k for pad, k in zip(window.before, window.kernel, strict=True))
    if list(padding) != after or too_wide:
        x, padding = pad_spatial(x, window.before, after, -torch.inf), (0,) * len(size)
    return _MAX_POOLS[len(size)](x, window.kernel, window.strides, padding, window.dilations)


def refuse_indices(node: Node) -> str | None:
    """Refuse the second output of MaxPool."""
    return "its output of indices is not supported" if node.wants(1) else None


def pool_average(node: Node, x: Tensor) -> Tensor:
    """AveragePool; a window counts the cells it covers, the padding only with ``count_include_pad``."""
    size = x.shape[2:]
    window = Window.of(node, size, node.get("kernel_shape"))
    over = window.overhang(size, bool(node.get("ceil_mode", 0)))
    if not any((*window.before, *window.after, *over)) and set(window.dilations) == {1}:
        return _AVERAGE_POOLS[len(size)](x, window.kernel, window.strides)
    sums = _window_sums(pad_spatial(x, window.before, _plus(window.after, over)), window)
    cells = x.new_ones((1, 1, *size))
    if node.get("count_include_pad", 0):
        cells = pad_spatial(cells, window.before, window.after, 1.0)
        cells = pad_spatial(cells, (0,) * len(size), over)
    else:
        cells = pad_spatial(cells, window.before, _plus(window.after, over))
    return sums / _window_sums(cells, window)


def pool_lp(node: Node, x: Tensor) -> Tensor:
    """LpPool."""
    size, p = x.shape[2:], node.get("p", 2)
    window = Window.of(node, size, node.get("kernel_shape"))
    over = window.overhang(size, bool(node.get("ceil_mode", 0)))
    powers = pad_spatial(x.abs().pow(p), window.before, _plus(window.after, over))
    sums: Tensor = _window_sums(powers, window).pow(1 / p)
    return sums


def _plus(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [one + other for one, other in zip(a, b, strict=True)]


def _window_sums(x: Tensor, window: Window) -> Tensor:
    rank = x.ndim - 2
    flat = x.reshape(-1, 1, *x.shape[2:])
    sums = _CONVOLUTIONS[rank](flat, x.new_ones((1, 1, *window.kernel)), None, window.strides, 0, window.dilations)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


def pool_average_whole(node: Node, x: Tensor) -> Tensor:
    """GlobalAveragePool."""
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def pool_max_whole(node: Node, x: Tensor) -> Tensor:
    """GlobalMaxPool."""
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


def pool_lp_whole(node: Node, x: Tensor) -> Tensor:
    """GlobalLpPool."""
    p = node.get("p", 2)
    sums: Tensor = x.abs().pow(p).sum(tuple(range(2, x.ndim)), keepdim=True).pow(1 / p)
    return sums


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "AveragePool": Operator(pool_average),
        "Conv": Operator(convolve),
        "ConvTranspose": Operator(convolve_transposed),
        "GlobalAveragePool": Operator(pool_average_whole),
        "GlobalLpPool": Operator(pool_lp_whole, since=2),
        "GlobalMaxPool": Operator(pool_max_whole),
        "LpPool": Operator(pool_lp, since=2),
        "MaxPool": Operator(pool_max, refuse=refuse_indices),
    }
)
