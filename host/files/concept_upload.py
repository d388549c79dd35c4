"""Concept files that a person drops on the web interface: checked, then put into models/perfusion.

A browser hands out what is in a dropped file, not where it lies, so the server has to keep it
before a loader can name it.
"""

from __future__ import annotations

import re
import secrets
import sys
from pathlib import Path

import folder_paths
from aiohttp import web

from ...perfusion.concept.concept_file import load_concept
from ...perfusion.files.safe_file import FILE_LIMIT, TEMPORARY, FileFormatError
from .concept_files import FOLDER
from .numbered_files import EXTENSION

ROUTE = "/perfusion/concepts"


def keep_dropped(name: str, content: bytes) -> str:
    """Put a dropped concept file into the first concept folder; returns its name there.

    A file of that name with the same content is left as it is; one with another content stays,
    and the new one gets a number. `name` may be anything a stranger wrote: of it, only letters,
    digits and ``_ . -`` of its last part are used.

    Raises:
        FileFormatError: when the content is no concept file that can be used.
    """
    root = Path(folder_paths.get_folder_paths(FOLDER)[0])
    stem = re.sub(r"[^\w.-]+", "_", Path(name.replace("\\", "/")).name.removesuffix(EXTENSION))
    stem = stem.strip(".") or "concept"
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".{secrets.token_hex(8)}{TEMPORARY}"
    try:
        temporary.write_bytes(content)
        try:
            load_concept(temporary)
        except FileFormatError as error:
            # The name a person knows, instead of that of the temporary file.
            raise FileFormatError(str(error).replace(str(temporary), name)) from error
        number = 0
        while (place := root / f"{stem}{f'_{number}' if number else ''}{EXTENSION}").exists():
            if place.read_bytes() == content:
                return place.name
            number += 1
        temporary.replace(place)
        return place.name
    finally:
        temporary.unlink(missing_ok=True)


async def receive(request: web.Request) -> web.Response:
    """POST of a file's content with ``?name=``; answers with ``{"name": ...}`` or ``{"error"}``."""
    content = await request.content.read(FILE_LIMIT + 1)
    while len(content) <= FILE_LIMIT and (more := await request.content.read(FILE_LIMIT + 1)):
        content += more
    try:
        name = keep_dropped(request.rel_url.query.get("name", ""), content)
    except FileFormatError as error:
        return web.json_response({"error": str(error)}, status=400)
    except OSError as error:
        return web.json_response({"error": f"the file cannot be kept: {error}"}, status=507)
    return web.json_response({"name": name})


def register_route() -> None:
    """Let ComfyUI's server take dropped files; nothing where no server runs."""
    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is not None:
        instance.routes.post(ROUTE)(receive)
