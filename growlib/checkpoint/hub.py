"""A finished checkpoint on its way to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from growlib.errors import GrowError

VALID = "a name such as me/big, a token that may write there (`hf auth login`), and a network"
FAULTS = (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError)


def repository(name: str) -> HfApi:
    """Make the repository, private where it is new: what would fail after hours of growth fails now.

    Raises:
        GrowError: the name is none, nobody is logged in, or the hub is out of reach.
    """
    hub = HfApi()
    try:
        hub.create_repo(name, private=True, exist_ok=True)
    except FAULTS as error:
        raise GrowError(f"--push-to-hub {name}", f"the hub refuses it ({_said(error)})", VALID) from error
    return hub


def upload(hub: HfApi, name: str, folder: str | Path) -> str:
    """Upload a folder; the address of the commit.

    Raises:
        GrowError: the hub is out of reach. The folder stays.
    """
    try:
        return str(hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Grown with growlib").commit_url)
    except FAULTS as error:
        wrong = f"the upload failed ({_said(error)}); {folder} is complete"
        raise GrowError(f"--push-to-hub {name}", wrong, f"hf upload {name} {folder}") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
