"""Every physical assumption of the simulator, with units and sources. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SimConfig:
    """The defaults are tuned to the published figures of the Kaggle data (see `iceaggr.realism`)."""

    # Primaries.
    energy_min: float = 2e2
    """GeV."""
    energy_max: float = 1e8
    """GeV."""
    index: float = 2.15
    """Spectral index of the bulk, dN/dE ~ E^-index."""
    hard_fraction: float = 0.0068
    """Share of proposals from a second, hard power law; it makes the tail of very bright events."""
    hard_index: float = 1.22
    hard_energy_min: float = 2e4
    """GeV."""
    track_fraction: float = 0.55
    """Muon-neutrino charged-current interactions; the others are cascades."""
    upstream_fraction: float = 0.75
    """Share of the tracks whose vertex lies upstream of the array."""
    radius: float = 650.0
    """Interactions (or the points that tracks aim at) fill a cylinder of this radius, m ..."""
    half_height: float = 550.0
    """... and half height, m."""
    neutral_current_fraction: float = 0.25
    """Share of cascades in which only the hadronic energy is visible."""
    hadronic_light: float = 0.8
    """Light of a hadronic shower relative to an electromagnetic one of the same energy."""

    # Muons that cross by chance: the cosmic-ray muons which no surface veto removes.
    coincident_rate: float = 6.5e3
    """Muons per second through the generation cylinder."""
    coincident_window: float = 14_000.0
    """They arrive within plus or minus this of the neutrino, ns."""

    # Muon energy loss and light.
    ionisation: float = 0.26
    """dE/dx = ionisation + radiative * E, GeV/m."""
    radiative: float = 3.6e-4
    """1/m."""
    minimum_light: float = 0.19
    """Cherenkov light of a bare muon, in GeV of shower per m (2.5e4 photons/m over 1.325e5 photons/GeV)."""
    burst_slots: int = 3
    """Stochastic losses drawn per muon; the rest of its radiative loss is spread evenly along it."""
    burst_min: float = 20.0
    """Stochastic losses below this are left in the even part, GeV."""

    # Light in ice.
    light_yield: float = 15.8
    """Photo-electrons m^2 per GeV of shower: photons per GeV times effective DOM area over 4 pi."""
    min_expected: float = 4e-3
    """DOMs expecting fewer photo-electrons than this from a source are skipped."""
    max_expected: float = 1e5
    """Saturation: no DOM expects more photo-electrons than this from one source."""
    acceptance_dipole: float = 0.3
    """The PMT looks down: acceptance 1 + dipole * (upward component of the light's direction)."""
    pandel_tau: float = 557.0
    """ns (AMANDA H2 ice model, astro-ph/0407044)."""
    pandel_lambda: float = 33.3
    """m, at `pandel_scattering`; elsewhere it scales with the effective scattering length."""
    pandel_scattering: float = 26.0
    """m."""

    # Photomultiplier and waveform unfolding.
    max_photons: int = 384
    """More photo-electrons of one source in one DOM are simulated as this many heavier ones."""
    jitter: float = 2.0
    """ns."""
    late_fraction: float = 0.035
    late_delay: float = 30.0
    """Mean of the exponential delay of late pulses, ns."""
    early_fraction: float = 0.003
    early_advance: float = 31.8
    """ns."""
    afterpulse_fraction: float = 0.059
    spe_fractions: tuple[float, float] = (0.02, 0.08)
    """Shares of the two exponentials of the single photo-electron charge, past the discriminator; the rest is
    Gaussian (the form of arXiv:2002.00997)."""
    spe_widths: tuple[float, float] = (0.027, 0.383)
    """Photo-electrons."""
    spe_mean: float = 0.93
    spe_sigma: float = 0.3
    fine_bin: float = 10.0
    """Photo-electrons closer than this become one pulse, ns, as long as the fast digitiser runs ..."""
    fine_length: float = 427.0
    """... that is for this long after the first one, ns; ..."""
    coarse_bin: float = 40.0
    """... later ones share pulses of this width, ns."""
    saturation: float = 50.0
    """Pulses far above this charge (p.e.) grow as its root: q / sqrt(1 + q / saturation)."""
    max_charge: float = 2762.0
    """Largest charge of one pulse, p.e."""

    # Noise.
    noise_rate: float = 495.0
    """Uncorrelated noise of a standard DOM, Hz; high-QE DOMs have 1.35 times as much."""
    burst_fraction: float = 0.2
    """Share of noise pulses with a companion on the same DOM."""
    burst_delay: float = 6_000.0
    """Mean delay of the companion, ns; but for ..."""
    burst_short_share: float = 0.3
    burst_short_delay: float = 25.0
    """... this share of them it is this, ns."""

    # Read-out.
    hlc_span: int = 2
    """A pulse is in local coincidence with another within this many DOMs on its string ..."""
    hlc_window: int = 1_000
    """... and this time, ns."""
    launch_length: int = 6_400
    """Later pulses of a launch in coincidence count as coincident, ns."""
    stamp_length: int = 75
    """An isolated launch keeps the pulses of its first ns ..."""
    stamp_dead: int = 2_450
    """... and is blind up to here, ns."""
    readout_before: int = 4_000
    """ns before the first trigger ..."""
    readout_after: int = 6_000
    """... and after the last; read-outs that touch are merged."""
    trigger_time: int = 9_863
    """The first trigger starts here in the read-out clock, ns, plus ..."""
    trigger_jitter: float = 7.0
    """... an exponential with this mean, at most 27 ns."""
