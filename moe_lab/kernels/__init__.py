"""Operations that move rows, as custom ops: each states its accumulation and rounding, and has a fake and a gradient."""
