"""An export on the Hugging Face hub: what was written and its model card, in one commit."""

from __future__ import annotations

from pathlib import Path

from d2o.errors import UserError
from d2o.export.exporter import Exported
from d2o.interop.download import offline
from d2o.interop.hub import is_repository

CARD = "README.md"


def check_push(repo: str, dry_run: bool) -> None:
    """Before the export, which takes its time. UserError: no name of a repository; unless `dry_run`: no token, or a
    network that is switched off."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo}: {str(error).splitlines()[0]}", "expected OWNER/NAME") from error
    if not is_repository(repo):
        raise UserError(f"--push {repo}: expected OWNER/NAME, as repositories of the hub are called")
    if dry_run:
        return
    if setting := offline():
        raise UserError(
            f"--push {repo}: the network is switched off ({setting})", "--dry-run shows what would go there"
        )
    if not get_token():
        what = f"--push {repo}: there is no token of the Hugging Face hub here"
        raise UserError(what, "`hf auth login`, or HF_TOKEN=..., with a token that may write; --dry-run needs none")


def contents(exported: Exported) -> dict[str, Path]:
    """What goes into the repository: name there -> file here; the card is its README."""
    if exported.path.is_dir():
        files = sorted(path for path in exported.path.rglob("*") if path.is_file())
        return {path.relative_to(exported.path).as_posix(): path for path in files}
    return {CARD: exported.card, exported.path.name: exported.path}


def push(exported: Exported, repo: str, public: bool = False) -> str:
    """Upload in one commit, into a repository that is private if it is made now (unless `public`; one that is there
    stays as it is). Returns the commit's address. UserError: no access, no network."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="d2o")
    files = contents(exported)
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()]
        done = api.create_commit(repo, added, commit_message=f"{exported.path.name}, exported by d2o")
    except Exception as error:  # the hub's client raises the errors of whichever HTTP library its version uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = f"may your token write to {repo}? {exported.path} is there; the same command goes on from it"
        raise UserError(f"cannot upload to {repo}: {reason}", hint) from error
    return done.commit_url
