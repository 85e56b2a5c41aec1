"""The real GPT-2's files: what is published, what is here, how to get the rest, and whether it is right."""

from .fetch import fetch as fetch
from .manifest import Entry as Entry
from .manifest import RemoteFile as RemoteFile
from .manifest import default_folder as default_folder
from .manifest import find as find
from .manifest import inventory as inventory
from .manifest import known_files as known_files
from .manifest import state as state
from .manifest import verified_checkpoint as verified_checkpoint
