"""The images in a request: its body, or the file parts of a form."""

from dataclasses import dataclass

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message

from service.images import ImageRefused


@dataclass(frozen=True)
class Upload:
    """One image as it was sent: a name for messages, and its bytes."""

    name: str
    data: bytes


async def read_uploads(request: Request, body: bytes, most: int) -> list[Upload]:
    """Return the images in a request's body, at least one and at most ``most``; raises ``ImageRefused``."""
    content_type = request.headers.get("content-type", "")
    if content_type[:9].lower() != "multipart":
        return [Upload("the body", body)]
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        return [Upload("the body", body)]
    try:
        uploads = await _read_form(request, body, most)
    except HTTPException as error:  # what the framework makes of a form that it cannot read
        raise ImageRefused(f"The form cannot be read: {error.detail}") from error
    # The framework takes a form that breaks off for one that ends with its last complete part.
    if b"--" + options[b"boundary"] + b"--" not in body:
        raise ImageRefused("The form is truncated; expected its closing boundary.")
    if not uploads:
        raise ImageRefused("The form holds no image; expected at least one file.")
    return uploads


async def _read_form(request: Request, body: bytes, most: int) -> list[Upload]:
    async def replay() -> Message:
        return {"type": "http.request", "body": body}

    uploads = []
    async with Request(request.scope, replay).form(max_files=most, max_fields=most) as form:
        for field, part in form.multi_items():
            if not isinstance(part, UploadFile):
                raise ImageRefused(f"Form field {field!r} is text; expected files only.")
            data = await part.read()
            uploads.append(Upload(part.filename or field, data))
    return uploads
