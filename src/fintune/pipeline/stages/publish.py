"""``fintune publish``: results to the Hugging Face hub, with a model card made from the manifests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from fintune.config import Config
from fintune.errors import ArtifactError, ResourceError
from fintune.manifest import MANIFEST, Facts, Manifest
from fintune.publish.card_facts import card_of
from fintune.publish.files import CARD, gather
from fintune.report.card import render_card
from fintune.util import hub as hub_push
from fintune.util.console import say
from fintune.util.files import write_atomically
from fintune.util.hub import Target, Upload
from fintune.util.text import format_bytes


def check(config: Config) -> None:
    """Refuse before any work what is sure to fail later: no token, or one that the hub does not know.

    Raises:
        ResourceError: With what to do.
    """
    hub_push.require_token()
    _know_token()


@lru_cache(maxsize=1)
def _know_token() -> None:
    try:
        hub_push.owner()
    except ResourceError as error:
        if "refuses the token" in error.message:
            raise
        # A hub that cannot be reached now may be there when training is over.


def publish(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    """Push what ``publish.artifacts`` names.

    Args:
        config: The run.
        inputs: Finished folders by step name; those that ``publish.artifacts`` needs, and for the card all that
            are there.
        folder: Gets the card.

    Returns:
        Repository, branch, commit, and what became of each file.

    Raises:
        ArtifactError: A result that is missing, stale or was changed.
        ConfigError: A licence that allows what the data forbid.
        ResourceError: The hub refuses it or cannot be reached.
    """
    options = config.publish
    repo = hub_push.full_name(options.repo_id or "")
    uploads = _prepare(config, repo, inputs, folder)
    target = Target(repo, options.private, options.branch, must_be_private=options.private)
    names = {each.name for each in uploads}
    done = hub_push.send(
        target,
        uploads,
        message=f"{', '.join(options.artifacts)} of run {config.run.name}",
        remove=_earlier(config, repo) - names,
        what=f"{repo} was not published",
    )
    say(done.address)
    return {
        "repo": repo,
        "branch": options.branch,
        "private": options.private,
        "commit": done.commit,
        "address": done.address,
        "file_bytes": {each.name: each.num_bytes for each in uploads},
        "sent": list(done.sent),
        "removed": list(done.removed),
        "num_sent_bytes": done.num_sent_bytes,
        "summary": f"{repo} at {done.commit[:8]}: {len(done.sent)} of {len(uploads)} files new, "
        f"{format_bytes(done.num_sent_bytes)}",
    }


def preview(config: Config, inputs: Mapping[str, Path], folder: Path) -> list[tuple[str, int]]:
    """Write the card and say what would be pushed; asks nobody.

    Args:
        config: The run.
        inputs: As for :func:`publish`.
        folder: Gets the card, and the adapter's configuration as it would be pushed.

    Returns:
        Name and bytes of each file.

    Raises:
        ArtifactError: As :func:`publish`.
        ConfigError: Likewise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    uploads = _prepare(config, config.publish.repo_id or "", inputs, folder)
    return [(each.name, each.num_bytes) for each in uploads]


def _prepare(config: Config, repo: str, inputs: Mapping[str, Path], folder: Path) -> Sequence[Upload]:
    made = gather(config, inputs, folder)
    card = card_of(config, repo, made, inputs)
    write_atomically(folder / CARD, render_card(card))
    if card.licence == "unknown":
        say("the card says licence unknown: neither base model nor data state one; set publish.license if you know it")
    if not card.base.hub_id:
        say("the card cannot say where the base model is: set publish.base_model to its name on the hub")
    return [*made.uploads, Upload(CARD, folder / CARD)]


def _earlier(config: Config, repo: str) -> set[str]:
    """What an earlier push of this run has left there; nothing of others is ever removed."""
    path = config.folder / "publish" / MANIFEST
    try:
        facts = Manifest.model_validate_json(path.read_bytes()).facts
    except OSError:
        return set()
    except ValueError:
        raise ArtifactError(f"{path}: not a manifest", hint="remove the folder; what was pushed stays") from None
    there = facts.get("repo") == repo and facts.get("branch") == config.publish.branch
    return set(facts.get("file_bytes", {})) if there else set()
