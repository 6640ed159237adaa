"""The card's section of hardware hours, energy and carbon, with its formulas."""

from __future__ import annotations

from pretrain.checkpoint.state import HardwareUse
from pretrain.config.trackers import CardConfig

SECONDS_PER_HOUR = 3600.0
JOULES_PER_KWH = 3.6e6
# Used if nothing was measured and the recipe gives no power: rough, because GPUs of data centres
# are limited to 70 to 1,000 W, and processors to some 4 to 15 W per core.
WATTS_OF_ACCELERATOR = 350.0
WATTS_OF_CORE = 10.0
NOT_COUNTED = (
    "Not counted: the preparation of data, evaluations in other processes, earlier experiments and "
    "the manufacture of the hardware."
)

Row = list[str | int | float | None]


def energy_kwh(card: CardConfig, use: HardwareUse) -> tuple[float, bool]:
    """Return the energy of a run in kWh, and whether counters have measured it.

    What counters have seen of the device hours is extrapolated to all of them. Without any it is an
    estimate from a power per device.
    """
    factor = card.power_usage_effectiveness
    if is_measured(use):
        joules = use["joules"] * use["device_seconds"] / use["covered_seconds"]
        return factor * joules / JOULES_PER_KWH, True
    hours = use["device_seconds"] / SECONDS_PER_HOUR
    return factor * hours * watts_per_device(card, use) / 1000.0, False


def is_measured(use: HardwareUse) -> bool:
    """Whether counters of energy have seen the run."""
    return use["joules"] > 0.0 and use["covered_seconds"] > 0.0


def watts_per_device(card: CardConfig, use: HardwareUse) -> float:
    """Return the power of an estimate: the recipe's, or a rough one of the kind of device."""
    if card.watts_per_device is not None:
        return card.watts_per_device
    return WATTS_OF_CORE * use["cores_per_device"] if use["is_cpu"] else WATTS_OF_ACCELERATOR


def hardware_rows(card: CardConfig, use: HardwareUse) -> list[Row]:
    """Return the rows of the section's table."""
    hours = use["device_seconds"] / SECONDS_PER_HOUR
    wall = use["wall_seconds"] / SECONDS_PER_HOUR
    kwh, measured = energy_kwh(card, use)
    how = "measured" if measured else "an estimate, not measured"
    core = "core" if use["cores_per_device"] == 1 else "cores"
    cores = f", {use['cores_per_device']} {core} each" if use["is_cpu"] else ""
    devices = "device" if use["devices"] == 1 else "devices"
    rows: list[Row] = [
        ["hardware, of the newest start", f"{use['devices']} {devices}: {use['device']}{cores}"],
        ["device hours", _shown(hours)],
        ["wall hours", _shown(wall)],
        ["starts", use["starts"]],
        [f"energy, kWh ({how})", _shown(kwh)],
    ]
    if card.grid_kg_per_kwh is not None:
        rows.append(["carbon, kg of CO2 equivalent", _shown(kwh * card.grid_kg_per_kwh)])
    return rows


def _shown(value: float) -> str:
    """A small run has used something too: four decimals would show nothing of it."""
    return f"{value:.4f}" if value >= 0.1 else f"{value:.3g}"


def hardware_formulas(card: CardConfig, use: HardwareUse) -> list[str]:
    """Return the sentences that say how the table was computed."""
    measured = is_measured(use)
    factor = card.power_usage_effectiveness
    data_centre = f" x {factor:g} (`card.power_usage_effectiveness`)"
    lines = [
        "Device hours = wall hours x ranks, summed over all starts of the run, from the creation of "
        "the processes to the last step or save. Work that was lost and done again is in them; the "
        "time between two starts, and a parent run, are not.",
    ]
    if measured:
        share = min(1.0, use["covered_seconds"] / use["device_seconds"])
        names = " and ".join(use["counters"]) or "counters"
        lines.append(
            f"Energy = joules of the counters ({names}) / share of the device hours that they "
            f"covered ({share:.1%}) / 3.6e6{data_centre}. The counters include whatever else ran "
            "on the same devices."
        )
    else:
        source = "`card.watts_per_device`"
        if card.watts_per_device is None:
            source = f"a rough default; {source} replaces it"
        watts = watts_per_device(card, use)
        lines.append(
            f"Energy = device hours x {watts:g} W per device ({source}) / 1000{data_centre}. No "
            "counter of energy could be read."
        )
    if card.grid_kg_per_kwh is not None:
        lines.append(f"Carbon = energy x {card.grid_kg_per_kwh:g} kg/kWh (`card.grid_kg_per_kwh`).")
    return [*lines, NOT_COUNTED]
