"""What can go wrong in an edit, said so that the person who asked for it can mend it. Free of torch."""


class EditingError(Exception):
    """Base of every error of this package.

    `pointer` is an RFC 6901 JSON pointer into the edit (`/source`, `/templates/1`, `/destination/images/0`) or into
    the call (`/alpha`, `/layers`), empty where no single field is to blame. `detail` says what is wrong and what to do.
    """

    def __init__(self, detail: str, *, pointer: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.pointer = pointer


class InvalidEdit(EditingError):
    """A field of an edit, or an argument of stage II, that cannot mean anything."""


class InvalidPrompt(InvalidEdit):
    """A prompt that the tokenizer cannot place: no placeholder, no subject, or a subject lost to truncation."""


class ImageRejected(InvalidEdit):
    """A reference image that cannot be encoded."""


class UnsafePipeline(EditingError):
    """Weights that exist only as pickles, which could run code when opened."""


class UnsupportedPipeline(EditingError):
    """A folder that is no diffusers pipeline, or one of a family that this version cannot edit."""


class OptimizationDiverged(EditingError):
    """A loss of stage I that became NaN or infinite."""


class SingularSecondMoment(EditingError):
    """Second moments that cannot be factored: too few captions for the width of the keys."""


class CaptionsUnreadable(EditingError):
    """A file that holds no captions, or a line of one that is none."""


class MetricUnavailable(EditingError):
    """A metric that lacks what it measures with: a package, a model in the folder given, or enough pictures."""


class ForeignSums(EditingError):
    """Partial sums of second moments that this run cannot go on from."""


class ClassifierUnusable(EditingError):
    """An image classifier that cannot be loaded, or that does not know a class that it is asked for."""


class TaskUnreadable(EditingError):
    """A file of a benchmark that cannot be read, or a task that it cannot give."""


class Cancelled(EditingError):
    """The caller asked for the edit to stop."""


def escape_pointer(token: str) -> str:
    """One reference token of a JSON pointer, RFC 6901 section 3."""
    return token.replace("~", "~0").replace("/", "~1")
