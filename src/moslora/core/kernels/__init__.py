"""The update on a GPU, in Triton: few passes over memory, dropout inside, the same bits on each run.

With A' = M·A composed before, k the dropout mask, c = 1/(1 - p) and s = alpha / r:

    H  = m·(k⊙x)·A'ᵀ          y   = x·Wᵀ + b + 2ᵉ·H·Bᵀ         s·c = m·2ᵉ, e ≥ 0
    D  = s·c·G·B              dB  = 2ᵉ·Gᵀ·H
    dA' = Dᵀ·(k⊙x)            dx  = G·W + k⊙(D·A')

H and D are ``(tokens, r)`` and carry the scales, so no tile is multiplied by them: m and s·c are applied to float32
sums before they are rounded, and a power of two rounds nothing. H never exceeds what it is without a scale.

Passes over memory (T tokens): x once for H; the output once more, or not at all where base product and update are one
kernel; G once for D and dB together (up to r = 32; twice above); x once for dA'; dx as the output. A mixer, a scale
and dropout add none. ``docs/performance.md`` counts the bytes.

Dropout keeps ``x[t, i]`` where 16 bits drawn for (seed, t, i) are at least ``n = round(65536·p)``, and rescales by
exactly ``65536 / (65536 - n)``; n is at least 1 where p > 0. The bits are Philox4x32 with 7 rounds (Salmon et al.,
SC 2011, doi:10.1145/2063384.2063405: the fewest that pass BigCrush), one call for 8 columns, so they depend on no tile
size, and nothing is stored for backward.

Sums are in float32 and in a fixed order, without atomics: the same device, configuration and input give the same bits.
Configurations are timed at the first call of a size and may differ between processes; under
``torch.use_deterministic_algorithms`` and in CUDA graph capture they are taken from a table in place of being timed.
"""
