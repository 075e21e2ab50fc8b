"""Errors of this package. Their messages say what is wrong and what to do. Free of torch."""


class EditingError(Exception):
    """Base of every error of this package.

    `pointer` is an RFC 6901 JSON pointer into the edit (`/source`, `/templates/1`, `/destination/images/0`) or into
    the call (`/alpha`, `/layers`). It is empty if no single field is wrong. `detail` is the message.
    """

    def __init__(self, detail: str, *, pointer: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.pointer = pointer


class InvalidEdit(EditingError):
    """A field of an edit, or an argument of stage II, is invalid."""


class InvalidPrompt(InvalidEdit):
    """A prompt has no placeholder or no subject, or truncation removes its subject."""


class ImageRejected(InvalidEdit):
    """A reference image cannot be decoded."""


class ImageTooLarge(ImageRejected):
    """A reference image has too many pixels."""


class UnknownImageFormat(ImageRejected):
    """A reference image is not a PNG, JPEG or WebP."""


class UnsafePipeline(EditingError):
    """The weights exist only as pickles, which could run code when opened."""


class UnsupportedPipeline(EditingError):
    """A folder is not a diffusers pipeline, or its family is not supported."""


class OptimizationDiverged(EditingError):
    """A loss of stage I became NaN or infinite."""


class SingularSecondMoment(EditingError):
    """Second moments cannot be factored: they come from too few captions for the width of the keys."""


class CaptionsUnreadable(EditingError):
    """A file has no captions, or a line of it is not a caption."""


class MetricUnavailable(EditingError):
    """A metric lacks a package, a model or enough pictures."""


class ForeignSums(EditingError):
    """Partial sums of second moments belong to another run."""


class ClassifierUnusable(EditingError):
    """An image classifier cannot be loaded, or does not know a class."""


class TaskUnreadable(EditingError):
    """A benchmark's file cannot be read, or it has no such task."""


class Cancelled(EditingError):
    """The caller cancelled the work."""


def escape_pointer(token: str) -> str:
    """Escape one reference token of a JSON pointer (RFC 6901, section 3)."""
    return token.replace("~", "~0").replace("/", "~1")
