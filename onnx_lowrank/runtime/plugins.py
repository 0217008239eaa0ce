"""Plugin execution providers: packages of their own that ONNX Runtime loads at run time.

A plugin is registered once in a process; it then offers devices, of which exactly one is taken:
the one whose provider has the plugin's own name (OpenVINO also offers an ``….AUTO``).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import importlib.util
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from onnx_lowrank.errors import InputError, named

__all__ = [
    "PLUGINS",
    "Plugin",
    "browser_folders",
    "device_of",
    "has_intel",
    "install_command",
    "no_use",
    "plugin_version",
    "registered",
    "registered_plugins",
    "requirements",
    "software_gpu",
]

_X86 = ("x86_64", "amd64")
_ARM = ("aarch64", "arm64")
_INTEL_VENDOR = "0x8086"


@dataclass(frozen=True)
class Plugin:
    """A plugin execution provider.

    Attributes:
        name: as the user writes it; also the extra of this package that installs it.
        title: how messages call it.
        provider: the name under which ONNX Runtime knows it.
        module: what its package is imported as.
        package: what its package is called.
        needs: what a machine must have for the plugin to offer a device.
        places: systems and processors that its package is built for; empty for all.
        options: provider options; see `emulated_options`.
        emulated_options: further ones where there is no such hardware and it is emulated.
    """

    name: str
    title: str
    provider: str
    module: str
    package: str
    needs: str = ""
    places: frozenset[tuple[str, str]] = frozenset()
    options: Mapping[str, str] = field(default_factory=dict)
    emulated_options: Mapping[str, str] = field(default_factory=dict)

    @property
    def emulated(self) -> bool:
        """Whether it does not run on hardware of its own here, so that its times mean nothing."""
        if self.name == "qnn":  # x86 wheels hold an emulator of the HTP
            return platform.machine().lower() in _X86
        return self.name == "webgpu" and software_gpu() is not None

    @property
    def all_options(self) -> dict[str, str]:
        """The provider options for this machine."""
        return {**self.options, **(self.emulated_options if self.emulated else {})}


PLUGINS: dict[str, Plugin] = {
    plugin.name: plugin
    for plugin in (
        Plugin(
            "openvino",
            "OpenVINO",
            "OpenVINOExecutionProvider",
            "onnxruntime_ep_openvino",
            "onnxruntime-ep-openvino",
            "an Intel processor, GPU or NPU",
            frozenset({("linux", "x86"), ("win32", "x86")}),
        ),
        Plugin(
            "qnn",
            "QNN",
            "QNNExecutionProvider",
            "onnxruntime_qnn",
            "onnxruntime-qnn",
            "a Qualcomm NPU, or x86-64, where it is emulated",
            frozenset({(system, kind) for system in ("linux", "win32") for kind in ("x86", "arm")}),
            {"backend_type": "htp", "enable_htp_fp16_precision": "1"},
            # Snapdragon 8 Gen 2: the emulator has to be told what it is.
            {"htp_arch": "73", "soc_model": "43"},
        ),
        Plugin(
            "webgpu",
            "WebGPU",
            "WebGpuExecutionProvider",
            "onnxruntime_ep_webgpu",
            "onnxruntime-ep-webgpu",
            "a GPU, or on Linux SwiftShader, which chromium brings",
        ),
    )
}

registered: set[str] = set()
"""Names of the plugins that this process has registered with ONNX Runtime."""


def install_command(extra: str) -> str:
    """The command that installs what an extra of this package asks for.

    It names those packages themselves, so that it works wherever this one was installed from.

    Args:
        extra: as pyproject.toml names it.
    """
    return shlex.join(["pip", "install", *requirements(extra)])


def requirements(extra: str) -> list[str]:
    """What an extra of this package asks for.

    Args:
        extra: as pyproject.toml names it.
    """
    wanted = []
    for entry in requires("onnx-lowrank") or ():
        requirement, _, marker = entry.partition(";")
        if f"extra == '{extra}'" in marker.replace('"', "'"):
            wanted.append(requirement.strip())
    return sorted(wanted)


def no_use(plugin: Plugin) -> str | None:
    """Why to install a plugin would not help on this machine; None where it may."""
    machine = platform.machine().lower()
    kind = "x86" if machine in _X86 else "arm" if machine in _ARM else machine
    if plugin.places and (sys.platform, kind) not in plugin.places:
        return f"there is no package of it for {sys.platform} on {machine}"
    if plugin.name == "openvino" and has_intel() is False:
        return f"it needs {plugin.needs}, and there is none here"
    return None


def has_intel() -> bool | None:
    """Whether this machine has a processor, GPU or NPU of Intel; None where that is not known."""
    if "GenuineIntel" in platform.processor():
        return True
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return None
    if "vendor_id" not in processor:
        return None
    if "GenuineIntel" in processor:
        return True
    for pattern in ("drm/card*/device/vendor", "accel/accel*/device/vendor"):
        for file in Path("/sys/class").glob(pattern):
            try:
                if file.read_text().strip() == _INTEL_VENDOR:
                    return True
            except OSError:
                return None
    return False


def registered_plugins() -> frozenset[str]:
    """Full names of the providers that this process has got from plugins."""
    return frozenset(PLUGINS[name].provider for name in registered)


def plugin_version(plugin: Plugin) -> str | None:
    """Version of the plugin's package; None where it is not installed."""
    if importlib.util.find_spec(plugin.module) is None:
        return None
    try:
        return version(plugin.package)
    except PackageNotFoundError:
        return "of unknown version"


def device_of(plugin: Plugin) -> Any:
    """The device that a session is opened on; registers the plugin with ONNX Runtime.

    Raises:
        InputError: the plugin is not installed, cannot be registered, or offers no device.
    """
    import onnxruntime as ort

    what = named("ep", plugin.name)
    if plugin_version(plugin) is None:
        how = no_use(plugin) or install_command(plugin.name)
        raise InputError(f"{what}: not installed; {how}")
    if not hasattr(ort, "get_ep_devices"):
        raise InputError(
            f"{what}: onnxruntime {ort.__version__} takes no plugins; "
            f"{install_command(plugin.name)} brings a newer one"
        )
    _prepare(plugin)
    if plugin.name not in registered:
        try:
            library = importlib.import_module(plugin.module).get_library_path()
            ort.register_execution_provider_library(plugin.provider, library)
        except Exception as error:  # its exceptions have no common base but this
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{what}: {plugin.package} {plugin_version(plugin)} cannot be registered with "
                f"onnxruntime {ort.__version__}: {reason}"
            ) from error
        registered.add(plugin.name)
    offered = [str(device.ep_name) for device in ort.get_ep_devices()]
    for device in ort.get_ep_devices():
        if device.ep_name == plugin.provider:
            return device
    hint = f"; it needs {plugin.needs}" if plugin.needs else ""
    raise InputError(
        f"{what}: the plugin offers no device on this machine, which has "
        f"{', '.join(offered) or 'none'}{hint}"
    )


def software_gpu() -> Path | None:
    """The description of SwiftShader, a Vulkan device on the CPU, where no GPU is at hand.

    None where there is a GPU, where the user chose a Vulkan driver, or where there is none.
    """
    if sys.platform != "linux" or any(Path("/dev/dri").glob("renderD*")):
        return None
    chosen = os.environ.get("VK_ICD_FILENAMES") or os.environ.get("VK_DRIVER_FILES")
    if chosen:
        path = Path(chosen.split(os.pathsep)[0])
        return path if "swiftshader" in path.name else None
    files = (folder / "vk_swiftshader_icd.json" for folder in browser_folders())
    return next((file for file in files if file.is_file()), None)


def browser_folders() -> Iterator[Path]:
    """Folders that hold a Chromium or Chrome."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        found = shutil.which(name)
        if found is not None:
            yield Path(found).resolve().parent
    for text in (
        "/usr/lib/chromium",
        "/usr/lib/chromium-browser",
        "/usr/lib64/chromium-browser",
        "/opt/google/chrome",
    ):
        yield Path(text)


def _prepare(plugin: Plugin) -> None:
    """Settle what a plugin reads from the environment, before it is first registered."""
    driver = software_gpu() if plugin.name == "webgpu" else None
    if driver is None:
        return
    os.environ["VK_ICD_FILENAMES"] = str(driver)
    os.environ["ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"] = "1"
    os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.gettempdir())
    loader = driver.with_name("libvulkan.so.1")
    if ctypes.util.find_library("vulkan") is None and loader.is_file():
        # The browser brings the loader too; loaded once, it is found by its name.
        ctypes.CDLL(str(loader), mode=ctypes.RTLD_GLOBAL)
