"""``fintune publish``: push results to the Hugging Face hub, with a model card made from the manifests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from fintune.config import Config
from fintune.errors import ResourceError
from fintune.manifest import Facts, Slot
from fintune.publish.card import card_of, render_card, unstated_licences
from fintune.publish.files import CARD, gather_files
from fintune.publish.push import PushTarget, Upload, push
from fintune.util.console import say
from fintune.util.files import write_atomically
from fintune.util.hub import RETRY_PAUSES, full_repo_name, require_token
from fintune.util.text import format_bytes


@lru_cache(maxsize=1)
def check_push() -> None:
    """Check once, before any work, that there is a token and that the hub accepts it.

    Raises:
        ResourceError: There is no token, or the hub refuses it.
    """
    require_token()
    try:
        full_repo_name("")
    except ResourceError as error:
        if "refuses the token" in error.message:
            raise
        # A hub that cannot be reached now may be back after training.


def publish(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    """Push the results that ``publish.artifacts`` names, with a card about every finished step.

    Raises:
        ArtifactError: A result is missing, older than its inputs, or was changed.
        ConfigError: The licence allows what the data forbid.
        ResourceError: The hub refuses the push or cannot be reached.
    """
    options = config.publish
    name = options.repo_id or ""
    repo = name if "/" in name else full_repo_name(name, pauses=RETRY_PAUSES)
    uploads = _prepare(config, repo, inputs, folder)
    names = {upload.name for upload in uploads}
    result = push(
        PushTarget(repo, options.private, options.branch, must_be_private=options.private),
        uploads,
        message=f"{', '.join(options.artifacts)} of run {config.run.name}",
        remove=_pushed_before(config, repo) - names,
        what=f"{repo} was not published",
        pauses=RETRY_PAUSES,
    )
    say(result.address)
    return {
        "repo": repo,
        "branch": options.branch,
        "private": options.private,
        "commit": result.commit,
        "address": result.address,
        "file_bytes": {upload.name: upload.num_bytes for upload in uploads},
        "sent": list(result.sent),
        "removed": list(result.removed),
        "num_sent_bytes": result.num_sent_bytes,
        "summary": f"{repo} at {result.commit[:8]}: {len(result.sent)} of {len(uploads)} files new, "
        f"{format_bytes(result.num_sent_bytes)}",
    }


def preview(config: Config, inputs: Mapping[str, Path], folder: Path) -> list[tuple[str, int]]:
    """Write the card and list name and bytes of the files of a push, without a request to the hub.

    Raises:
        FintuneError: The errors of :func:`publish`, but for those of the hub.
    """
    folder.mkdir(parents=True, exist_ok=True)
    uploads = _prepare(config, config.publish.repo_id or "", inputs, folder)
    return [(upload.name, upload.num_bytes) for upload in uploads]


def _prepare(config: Config, repo: str, inputs: Mapping[str, Path], folder: Path) -> Sequence[Upload]:
    publication = gather_files(config, inputs, folder)
    card = card_of(config, repo, publication, inputs)
    write_atomically(folder / CARD, render_card(card))
    for line in unstated_licences(config, card):
        say(line)
    if not card.base.hub_id:
        say("the card does not name the base model on the hub: set publish.base_model=OWNER/NAME")
    return [*publication.uploads, Upload(CARD, folder / CARD)]


def _pushed_before(config: Config, repo: str) -> set[str]:
    """Return the files that an earlier push of this run left in the repository. Only these may be removed."""
    manifest = Slot(config.folder, "publish").manifest()
    facts = {} if manifest is None else manifest.facts
    is_same_target = facts.get("repo") == repo and facts.get("branch") == config.publish.branch
    return set(facts.get("file_bytes", {})) if is_same_target else set()
