"""Which visual tokens are kept, and after which decoder layers the others are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from sqap.errors import InputError

PruningMethod = Literal["lookahead", "sqap", "attention", "random", "uniform", "divprune", "dart", "cdpruner"]
ScoreQueries = Literal["text", "last", "actions"]
Rest = Literal["random", "farthest", "changed"]

# Methods whose budget is shared: the best by score, the ring around the end effector, and the rest.
SHARED: tuple[PruningMethod, ...] = ("lookahead", "sqap")
_BY_METHOD: dict[str, dict[str, Any]] = {
    "lookahead": {"top_share": 0.75, "ring_share": 0.0, "rest": "random"},
    "sqap": {"top_share": 0.5, "ring_share": 0.3, "rest": "farthest"},
}
_AS_THE_METHOD = cast(Any, None)


@dataclass(frozen=True)
class Cut:
    """One more cut behind a later layer.

    Args:
        after_layer: number of decoder layers that run before it.
        keep_ratio: share kept of all visual tokens, those included that are gone already.
    """

    after_layer: int
    keep_ratio: float


@dataclass(frozen=True)
class Pruning:
    """Which visual tokens are kept after decoder layer ``after_layer``.

    The budget is exactly ``round(keep_ratio * N)``. Method ``"lookahead"`` gives most of it to the tokens
    that the later layers' own projections would attend to (`sqap.pruning.lookahead`); the rest is random.
    ``"sqap"`` is the mix of SQAP-VLA (arXiv 2509.09090): the top tokens by attention of the quantized model,
    the ring around the end effector, and farthest-point sampling for the rest. The others are rivals:
    ``"attention"`` (FastV), ``"divprune"``, ``"dart"``, ``"cdpruner"`` (`sqap.pruning.rivals`), ``"random"``
    and ``"uniform"``.

    Args:
        keep_ratio: share of visual tokens kept, in (0, 1].
        after_layer: number of decoder layers that still see every token; at least 1.
        method: the criterion.
        score_queries: whose attention counts: every token after the image ("text"), the last alone ("last"),
            or the action expert's tokens in the first denoising step ("actions"; of "lookahead" with flow
            heads, whose experts read keys and values of every layer). None: "actions" where it can be,
            else "text".
        score_layers: the decoder layers, counted from 0, whose attention is averaged into the scores. With
            "lookahead" they are those behind the last cut that are looked ahead at; None leaves the choice to
            calibration. With "sqap" and "attention" they are below ``after_layer``; None is the last layer
            that sees every token.
        top_share: largest share of the budget the ranking may take; calibration may lower it. 0.75 of
            "lookahead", 0.5 of "sqap" if not given.
        overlap: the ranking is trusted up to the largest k at which quantized and full-precision top k
            overlap at least this much on the calibration frames.
        ring: inner and outer radius around the projected end effector, as shares of the side of the crop that
            is looked at.
        ring_share: largest share of the budget the ring may take; 0 of "lookahead", 0.3 of "sqap" if not
            given.
        rest: what fills the budget: random tokens ("random"; the default of "lookahead"), the points farthest
            from those kept ("farthest"; the default of "sqap"), or the tokens whose projected features have
            changed most since the previous step ("changed"; random where no memory of it is given).
        later: more cuts behind later layers, each of them to fewer tokens.

    Raises:
        InputError: a setting is out of range or contradicts another.
    """

    keep_ratio: float = 0.6
    after_layer: int = 2
    method: PruningMethod = "lookahead"
    score_queries: ScoreQueries | None = None
    score_layers: tuple[int, ...] | None = None
    top_share: float = _AS_THE_METHOD
    overlap: float = 0.8
    ring: tuple[float, float] = (0.05, 0.2)
    ring_share: float = _AS_THE_METHOD
    rest: Rest = _AS_THE_METHOD
    later: tuple[Cut, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in get_args(PruningMethod):
            raise InputError(f"pruning method must be one of {', '.join(get_args(PruningMethod))}")
        for name, value in _BY_METHOD.get(self.method, _BY_METHOD["sqap"]).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.after_layer < 1:
            raise InputError(f"after_layer must be at least 1, got {self.after_layer}")
        if self.score_queries == "actions" and self.method != "lookahead":
            raise InputError(
                f"score_queries 'actions' needs method 'lookahead'; {self.method!r} reads the attention of "
                "layers that run before any action token does"
            )
        self._check_cuts()
        self._check_score_layers()
        for name in ("top_share", "overlap", "ring_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.top_share + self.ring_share > 1:
            raise InputError(
                f"top_share {self.top_share} and ring_share {self.ring_share} add up to more than the budget"
            )
        if not 0 <= self.ring[0] < self.ring[1]:
            raise InputError(f"ring must be (inner, outer) with 0 <= inner < outer, got {self.ring}")

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """All cuts in the order of their layers, the first included."""
        return Cut(self.after_layer, self.keep_ratio), *self.later

    @property
    def last_layer(self) -> int:
        """Decoder layers that run before the last cut."""
        return self.cuts[-1].after_layer

    def budget(self, tokens: int, cut: int = -1) -> int:
        """Exactly how many of ``tokens`` visual tokens are kept behind a cut; behind the last by default.

        Raises:
            InputError: the ratio is so small that none would be.
        """
        ratio = self.cuts[cut].keep_ratio
        kept = round(ratio * tokens)
        if kept < 1:
            raise InputError(
                f"keep_ratio {ratio} keeps none of {tokens} visual tokens; {1 / tokens:.4g} keeps one"
            )
        return kept

    def _check_cuts(self) -> None:
        for cut in self.cuts:
            if not 0 < cut.keep_ratio <= 1:
                raise InputError(f"keep_ratio must be in (0, 1], got {cut.keep_ratio}")
        for before, cut in zip(self.cuts, self.later, strict=False):
            if cut.after_layer <= before.after_layer or cut.keep_ratio >= before.keep_ratio:
                raise InputError(
                    f"a cut to {cut.keep_ratio} after layer {cut.after_layer} must come later and keep fewer "
                    f"than the one before it, to {before.keep_ratio} after layer {before.after_layer}"
                )
        if self.later and self.method == "uniform":
            raise InputError("method 'uniform' has one cut: no grid lies in another")

    def _check_score_layers(self) -> None:
        if self.score_layers is None:
            return
        if self.method == "lookahead":
            wrong = [layer for layer in self.score_layers if layer < self.last_layer]
            if wrong or not self.score_layers:
                raise InputError(
                    f"score_layers {list(self.score_layers)} must name layers from {self.last_layer} on: "
                    "method 'lookahead' looks at those behind the last cut"
                )
            return
        outside = [layer for layer in self.score_layers if not 0 <= layer < self.after_layer]
        if outside or not self.score_layers:
            raise InputError(
                f"score_layers {list(self.score_layers)} must name layers from 0 to "
                f"{self.after_layer - 1}: those that see every token, with after_layer {self.after_layer}"
            )
