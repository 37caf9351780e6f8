"""The errors that tasks raise by name, except those of the actors."""


class InvalidKeyError(ValueError):
    """A key that would leave the store's root, or that no store can hold."""


class UnsafeFileError(PermissionError):
    """The file at a key lies outside the store's root, or cannot be read to its end."""


class OversizeError(ValueError):
    """A file that is larger than the caller allows."""


class NoConditionalPutError(ValueError):
    """A store that overwrites a file although it was told to create it only."""


class OutputBusyError(RuntimeError):
    """Another run is working on this output."""


class LeaseLostError(RuntimeError):
    """A later run has taken this run for dead and has taken over."""


class AcceleratorFaultError(RuntimeError):
    """The GPU has failed in a way that leaves its process unusable: every later call there would fail too."""


class ManifestError(ValueError):
    """A manifest that cannot be read, or a query that it does not answer."""


class NoManifestError(ManifestError):
    """An output without a manifest: nothing has been committed yet."""


class ChoicesError(ValueError):
    """A file of choices that cannot be applied."""


class ExportError(ValueError):
    """An export that cannot be made as it was asked for, or would overwrite something."""


class EstimateError(ValueError):
    """A run whose cost cannot be told beforehand in the way that was asked for."""


class CatalogError(ValueError):
    """A catalog that cannot be read as a table of prompts."""


class MissingImageError(ValueError):
    """A catalog row names an image that the archive does not have."""
