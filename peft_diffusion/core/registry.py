"""The adapters of a base: one view of what its components carry."""

from collections.abc import Mapping

from torch import nn

from .component import ComponentState
from .errors import UserError, did_you_mean
from .slot import state_of
from .strength_schedule import Schedule, Timed


class Registry:
    """The adapters that the components of a base carry, whoever attached them.

    It keeps nothing: all is read from the components when it is asked. So every registry of the same components says the
    same, that of a copy says what the copy carries, and where a component was put in another's place, it says what the new
    one carries. An adapter is there as long as one of the components carries it.

    Args:
        components: The components of the base by name.
    """

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self._components = components

    def states(self, name: str | None = None) -> dict[str, ComponentState]:
        """What each component carries, by the component's name.

        Args:
            name: Only components that carry this adapter.

        Returns:
            Nothing for components without adapters.
        """
        found = {component: state_of(part) for component, part in self._components.items()}
        return {
            component: state
            for component, state in found.items()
            if state is not None and (name is None or name in state.entries)
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in the order of loading."""
        first: dict[str, int] = {}
        for state in self.states().values():
            for name, entry in state.entries.items():
                first[name] = min(first.get(name, entry.since), entry.since)
        return tuple(sorted(first, key=first.__getitem__))

    @property
    def schedules(self) -> dict[str, Schedule | Timed]:
        """The strengths that change over the steps, by the name of the adapter."""
        found: dict[str, Schedule | Timed] = {}
        for state in self.states().values():
            found = state.strengths.schedules | found
        return {name: found[name] for name in self.names if name in found}

    @property
    def merged(self) -> tuple[str, ...]:
        """The components whose adapters are merged into the weights."""
        return tuple(component for component, state in self.states().items() if state.strengths.merged)

    @property
    def images(self) -> int:
        """How many images have strengths of their own; 1 where all have the same."""
        return max((state.strengths.images for state in self.states().values()), default=1)

    def carriers(self, name: str) -> dict[str, ComponentState]:
        """Find the components that carry an adapter.

        Args:
            name: What it is called.

        Returns:
            Their states, by name.

        Raises:
            UserError: None does.
        """
        found = self.states(name)
        if not found:
            there, near = ", ".join(self.names) or "none", did_you_mean(name, self.names)
            raise UserError(f"no adapter {name!r} is loaded; there are: {there}{near}")
        return found

    def info(self, name: str) -> object | None:
        """Tell where an adapter came from, as whoever loaded it said.

        Args:
            name: What it is called.

        Returns:
            What was said; None where it was attached without a file.

        Raises:
            UserError: There is no such adapter, or components that came from different bases carry different ones under the
                name.
        """
        by_component = {component: state.entries[name].info for component, state in self.carriers(name).items()}
        first, *others = by_component.values()
        if any(other != first for other in others):
            raise UserError(
                f"{' and '.join(by_component)} carry different adapters under the name {name!r}, as components of different"
                " origin may; remove it, and load what is wanted"
            )
        return first

    def enter(self, name: str, info: object) -> None:
        """Say where an adapter came from.

        Args:
            name: Its name.
            info: What ``info`` is to return.

        Raises:
            UserError: There is no such adapter.
        """
        for state in self.carriers(name).values():
            state.enter(name, info)

    def refuse_merged(self, wish: str) -> None:
        """See that no adapter is merged into the weights.

        Args:
            wish: What cannot be done while one is, as in "load another".

        Raises:
            UserError: One is.
        """
        if self.merged:
            raise UserError(f"adapters are merged into the weights; unmerge them before you {wish}")
