"""Scans in, pictures out: decoding, CIE L*a*b*, joining chroma to a scan's own lightness, encoding. Knows no model."""
