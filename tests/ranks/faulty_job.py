"""The padded job on a machine that breaks while a checkpoint is written; copied into a project's folder by tests."""

import os
import resource
import signal

from padded_job import RANK, Padded

from launcher.checkpoint import files, saver, store


class Faulty(Padded):
    """``fault`` names the instant at which a rank is killed, or says that its disk is full, in one checkpoint."""

    def __init__(self, fault: str = "nothing", fault_rank: int = 0, fault_step: int = 10, **arguments) -> None:
        super().__init__(**arguments)
        if fault_rank != RANK or os.path.exists("broken"):
            return
        self._place = f"step-{fault_step:08d}"
        if fault == "full":
            self._fill_the_disk()
        else:
            getattr(self, f"_die_{fault.replace(' ', '_')}")()

    def _die(self) -> None:
        open("broken", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)

    def _die_nothing(self) -> None: ...

    def _die_when_it_begins(self) -> None:
        real = store.CheckpointStore.begin

        def begin(this, step):
            folder = real(this, step)
            if self._place in folder.name:
                self._die()
            return folder

        store.CheckpointStore.begin = begin

    def _die_in_the_data(self) -> None:
        real = files.DigestedFile.write

        def write(this, data):
            written = real(this, data)
            if self._place in str(this.path) and this.path.name.startswith("__") and this.tell() > 20000:
                self._die()
            return written

        files.DigestedFile.write = write

    def _die_closing(self, name: str) -> None:
        real = files.DigestedFile.close

        def close(this):
            if self._place in str(this.path) and this.path.name.startswith(name):
                self._die()
            return real(this)

        files.DigestedFile.close = close

    def _die_in_its_own_file(self) -> None:
        self._die_closing("rank-")

    def _die_in_the_report(self) -> None:
        self._die_closing("report-")

    def _die_in_the_metadata(self) -> None:
        self._die_closing(".metadata")

    def _die_in_the_manifest(self) -> None:
        self._die_closing("manifest")

    def _die_before_the_reports_are_read(self) -> None:
        real = saver.collect_parts

        def collect(folder, *arguments):
            if self._place in folder.name:
                self._die()
            return real(folder, *arguments)

        saver.collect_parts = collect

    def _die_around_a_rename(self, source_ends: str, after: bool) -> None:
        real = os.rename

        def rename(source, target, **options):
            hit = self._place in str(source) and str(source).endswith(source_ends)
            if hit and not after:
                self._die()
            real(source, target, **options)
            if hit:
                self._die()

        store.os.rename = rename

    def _die_before_the_rename(self) -> None:
        self._die_around_a_rename(".partial", after=False)

    def _die_after_the_rename(self) -> None:
        self._die_around_a_rename(".partial", after=True)

    def _die_removing_it(self) -> None:
        self._die_around_a_rename(self._place, after=True)

    def _fill_the_disk(self) -> None:
        """A limit of the kernel's: writing fails as on a full disk, with another word for it."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        real = saver.write_part

        def write_part(folder, *arguments):
            if self._place not in folder.name:
                return real(folder, *arguments)
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
            try:
                return real(folder, *arguments)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        saver.write_part = write_part
