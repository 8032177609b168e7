"""A run on disk: every file name, and how each file is written so that it is whole or absent."""

from launcher.rundir.layout import RunDirectory
from launcher.rundir.records import append_json_line, read_json, write_json
from launcher.rundir.status import State, Status

__all__ = ["RunDirectory", "State", "Status", "append_json_line", "read_json", "write_json"]
