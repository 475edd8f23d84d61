"""The position of a run in its data: TrainState, the windows that a rewind left out, and which samples come next."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Window:
    """Global sample indices [start, start + count) that training leaves out."""

    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Cut:
    """How a source's tokens are cut into samples, from its sample number `from_index` on."""

    from_index: int
    seq_len: int
    shuffle_block: int


@dataclass(frozen=True)
class MixtureStart:
    """Where a mixture of other sources or weights took over from the one before it."""

    from_sample: int
    """Global sample index; what came before is the earlier mixture's."""
    given: dict[str, int]
    """Samples that each source had given by then, by name; sources that are gone stay in it."""
    numbers: dict[str, int]
    """By name: the number that keys a source's order. It never changes, whatever place the source has in the settings."""
    cuts: dict[str, tuple[Cut, ...]] = field(default_factory=dict)
    """By name: the lengths of samples that a source has had, oldest first, where they have changed; see recut.py."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back; without cuts as release 0.1 wrote it."""
        value = asdict(self)
        return value if self.cuts else {key: item for key, item in value.items() if key != "cuts"}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "MixtureStart":
        """Raises TypeError or KeyError on anything but what `to_json` gave."""
        cuts = {name: tuple(Cut(**cut) for cut in items) for name, items in value.get("cuts", {}).items()}
        return cls(**{**value, "cuts": cuts})


@dataclass(frozen=True)
class TrainState:
    """All that a run needs besides weights and optimizer. `samples` is the next global sample index."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: tuple[Window, ...] = ()
    mixture: MixtureStart | None = None
    """None: the mixture of the settings has been there from the first sample on."""

    def advance(self, num_samples: int, num_tokens: int) -> "TrainState":
        """The state after a step that used `num_samples` samples (skipped ones not counted) and `num_tokens` targets."""
        last = sample_indices(self, num_samples)[-1]
        samples = sample_indices(replace(self, samples=last + 1), 1)[0]
        return replace(self, step=self.step + 1, samples=samples, tokens=self.tokens + num_tokens)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        value = asdict(self)
        del value["mixture"]
        return value if self.mixture is None else {**value, "mixture": self.mixture.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TrainState":
        """Raises TypeError or KeyError on anything but what `to_json` gave."""
        mixture = MixtureStart.from_json(value["mixture"]) if value.get("mixture") else None
        return cls(**{**value, "skipped": tuple(Window(**window) for window in value["skipped"]), "mixture": mixture})


def sample_indices(state: TrainState, count: int) -> list[int]:
    """The next `count` global sample indices that are in no skipped window."""
    indices: list[int] = []
    position = state.samples
    for window in sorted(state.skipped, key=lambda window: window.start):
        if window.start >= position + count - len(indices):
            break
        indices += range(position, max(position, window.start))
        position = max(position, window.start + window.count)
    return [*indices, *range(position, position + count - len(indices))]
