"""Downloads files of a Kaggle data set in a process of its own, with Kaggle's client kagglehub.

Its own process, because the client waits for ever for a server that is silent, prints to standard
output, and asks for no time limit: here every wait on the network has one, and what it prints goes
nowhere. The client itself finds the user's credentials, and none of them come back from here.

The request is JSON in the first argument, and the result JSON on standard output: the files, the
version, or an error by its kind.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

# Seconds until a connection is there; between two pieces of a response the request says how many.
CONNECT_SECONDS = 20.0
# As earlier versions of the client read it: another address than api.kaggle.com, such as a mirror.
ENDPOINT = "KAGGLE_API_ENDPOINT"
WILDCARDS = re.compile(r"[*?[]")
# Where Kaggle's and Colab's own machines have the data sets, as the client knows it.
MOUNTS = ("KAGGLE_CACHE_MOUNT_FOLDER", "COLAB_CACHE_MOUNT_FOLDER")
MOUNT = "/kaggle/input"


def main() -> None:
    """Download what the request names, and print what came of it."""
    request = json.loads(sys.argv[1])
    # The client prints notices of newer versions, and at some settings whole requests.
    output = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        result = download(request)
    except BaseException as error:
        result = failure(error)
    os.write(output, json.dumps(result).encode())


def download(request: dict[str, Any]) -> dict[str, Any]:
    """Download the files, again after a failure of the network.

    Args:
        request: ``dataset``, ``version`` or null for the newest, ``files``: names or patterns, or
            none for all; ``stall_seconds`` and ``attempts``.
    """
    import requests

    limit_waits(request["stall_seconds"])
    for attempt in range(1, request["attempts"] + 1):
        try:
            return fetch(request)
        except requests.exceptions.RequestException as error:
            status = status_of(error)
            if attempt == request["attempts"] or (status is not None and status < 500):
                raise
            time.sleep(min(2.0 ** (attempt - 1), 30.0))
    raise AssertionError("unreachable: the last attempt raises")


def limit_waits(stall_seconds: float) -> None:
    """Give every request of this process a time limit, and another address if one is named."""
    import requests
    from kagglesdk import kaggle_env

    send = requests.adapters.HTTPAdapter.send

    def limited(self: Any, *given: Any, **named: Any) -> Any:
        named["timeout"] = (min(CONNECT_SECONDS, stall_seconds), stall_seconds)
        return send(self, *given, **named)

    requests.adapters.HTTPAdapter.send = limited  # type: ignore[method-assign]
    if endpoint := os.environ.get(ENDPOINT):
        kaggle_env._env_to_endpoint[kaggle_env.get_env()] = endpoint.rstrip("/")


def fetch(request: dict[str, Any]) -> dict[str, Any]:
    """Download the files, of one version: those that are in the client's cache are left there."""
    import kagglehub

    handle = request["dataset"]
    version = request["version"]
    names = request["files"]
    # A pattern is only known by looking at all files.
    asked = [None] if not names or any(map(WILDCARDS.search, names)) else list(dict.fromkeys(names))
    found: list[str] = []
    for name in asked:
        pinned = f"{handle}/versions/{version}" if version else handle
        path = Path(kagglehub.dataset_download(pinned, path=name))
        # Where the version was not named, the client's cache says which one is the newest.
        version = version or version_in(path)
        files = (
            [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
        )
        if name is None:
            files = [each for each in files if is_wanted(each.relative_to(path).as_posix(), names)]
        found += map(os.path.abspath, files)
    # A file may be named by itself and with its folder.
    return {"files": list(dict.fromkeys(found)), "version": version}


def cache_folder() -> str:
    """Return the absolute path of the client's cache."""
    default = os.path.join(Path.home(), ".cache", "kagglehub")
    return os.path.abspath(os.environ.get("KAGGLEHUB_CACHE", default))


def path_inside(dataset: str, file: str) -> str | None:
    """Return a file's path inside its data set; None for one that is in no place of the client."""
    owner, name = map(re.escape, dataset.split("/"))
    cache = re.escape(os.path.join(cache_folder(), "datasets"))
    places = [rf"{cache}/{owner}/{name}/versions/\d+"]
    for mount in MOUNTS:
        folder = re.escape(os.path.abspath(os.environ.get(mount, MOUNT)))
        places.append(rf"{folder}/(?:datasets/{owner}/)?{name}(?:/versions/\d+)?")
    for place in places:
        if match := re.fullmatch(f"{place}/(.+)", file, re.DOTALL):
            return match[1]
    return None


def version_in(path: Path) -> int | None:
    """Return the version in a path of the client's cache; None on Kaggle's own machines."""
    match = re.search(r"/versions/(\d+)(/|$)", path.as_posix())
    return None if match is None else int(match[1])


def is_wanted(name: str, patterns: list[str]) -> bool:
    """Whether a file of the data set is asked for; without a pattern every one is."""
    return not patterns or any(
        name == pattern or fnmatchcase(name, pattern) or name.startswith(f"{pattern}/")
        for pattern in patterns
    )


def status_of(error: BaseException) -> int | None:
    """Return the server's HTTP status; None if it sent none."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def failure(error: BaseException) -> dict[str, Any]:
    """Return the kind of an error, and no text of it that may hold an address with a signature."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return {"error": kinds, "status": status_of(error)}


if __name__ == "__main__":
    main()
