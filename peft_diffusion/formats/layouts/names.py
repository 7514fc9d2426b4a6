"""Names of the kohya layout, as data; needs no torch."""

import re

from ...bases import family as families

# LyCORIS outside of kohya's trainer begins every name so, whatever model it is on; paths tell which (`Component.lycoris`).
LYCORIS = "lycoris_"

# What no published layout can say stands beside it: peft_diffusion.<component>.<path>.<suffix>, a suffix having no dot.
OWN = "peft_diffusion."

BUNDLE = "bundle_emb."
_ORIGINAL = re.compile(r"(?:lora_unet|lycoris)_(?:input_blocks|middle_block|output_blocks)_")
WORD = re.compile(r"<\S+>")  # the one tensor of an embedding as diffusers' scripts write it, for the first text encoder


def prefixes(component: str) -> tuple[str, ...]:
    """List what the sites of a component begin with in kohya's files, of all families.

    Args:
        component: Its name.

    Returns:
        The prefixes; none for a component that no family has.
    """
    rows = [one for family in families.every() for one in family.components if one.name == component]
    return tuple(dict.fromkeys(one.kohya for one in rows))


def written_prefix(component: str, family: str) -> str:
    """Name what the sites of a component begin with in a file for a family.

    Args:
        component: Its name.
        family: That of the base.

    Returns:
        The prefix; for a component that the family has not, that of the first that has it.
    """
    own = {one.name: one.kohya for one in families.find(family).components}
    return own.get(component) or families.components()[component].kohya


def embeddings() -> dict[str, str]:
    """List what embeddings of new words are called, which have no site in their names.

    Returns:
        The component whose token embedding they belong to, by name.
    """
    return {name: component for component, one in families.components().items() for name in one.embeddings}


def is_original(site: str) -> bool:
    """Tell whether a site has the name that a UNet's had before diffusers.

    Args:
        site: Its name in a file.

    Returns:
        Whether it has.
    """
    return _ORIGINAL.match(site) is not None


def split(name: str) -> tuple[str, str]:
    """A tensor's name as site and suffix."""
    if name in embeddings() or name.startswith(BUNDLE) or WORD.fullmatch(name):
        return name, "vectors"
    if name.startswith(OWN):
        site, _, suffix = name.rpartition(".")
    else:
        site, _, suffix = name.partition(".")
    return site, suffix


def component_of(site: str) -> str | None:
    """The component that a site's name in a file belongs to."""
    if site in embeddings() or site.startswith(BUNDLE):
        return embeddings().get(site.rpartition(".")[2])
    if WORD.fullmatch(site):
        return next(iter(families.components("text encoder")))
    if site.startswith(OWN):
        component = site.removeprefix(OWN).split(".")[0]
        return component if component in families.components() else None
    if site.startswith(LYCORIS):
        path = site.removeprefix(LYCORIS)
        claims = [(name, one.lycoris) for name, one in families.components().items()]
        claims.sort(key=lambda claim: "" in claim[1])  # what takes every path takes those that are left
        return next((name for name, paths in claims if path.startswith(paths)), None)
    return next((name for name in families.components() if site.startswith(prefixes(name))), None)
