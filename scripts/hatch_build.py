"""Build hook of the wheel: compiles the kernels into it where there is a toolchain.

Without nvcc the wheel is pure Python, and the kernels are built at first use.
SAMOYEDS_HF_BUILD_KERNELS=0 asks for that, and =1 makes a missing toolchain an error. An editable
install never builds. Neither torch nor a GPU is looked for: all architectures are built.
"""

import os
import sys
import sysconfig
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "SAMOYEDS_HF_BUILD_KERNELS"


class KernelBuildHook(BuildHookInterface):
    """Adds ``samoyeds_hf/_lib/libsamoyeds.so`` and the platform's tag."""

    def initialize(self, version, build_data):
        wish = os.environ.get(VARIABLE)
        if version == "editable" or wish == "0":
            return
        sys.path.insert(0, self.root)  # the package itself needs nothing that is not there
        try:
            from samoyeds_hf.errors import BuildError
            from samoyeds_hf.toolchain import compile_library, find_toolchain, last_lines
        finally:
            sys.path.remove(self.root)
        try:
            toolchain = find_toolchain()
        except BuildError as missing:
            if wish == "1":
                raise
            self.app.display_warning(f"No kernels in this wheel. {missing}")
            return
        self.work = tempfile.TemporaryDirectory(prefix="samoyeds-wheel-")
        folder = Path(self.work.name)
        log = folder / "build.log"
        self.app.display_info(f"Building the CUDA kernels with CUDA {toolchain.cuda} ...")
        try:
            library = compile_library(toolchain, Path(self.root, "kernels"), (), folder, log)
        except BuildError as error:
            raise BuildError(
                f"{error}; correct that, or set {VARIABLE}=0 for a wheel without kernels. "
                f"The log ends:\n{last_lines(log)}"
            ) from None
        build_data["force_include"][str(library)] = "samoyeds_hf/_lib/libsamoyeds.so"
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"  # C through ctypes: any Python 3

    def finalize(self, version, build_data, artifact_path):
        if hasattr(self, "work"):
            self.work.cleanup()
