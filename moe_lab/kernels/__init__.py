"""Operations that move rows, as custom ops: each states its accumulation and rounding, has a fake and a gradient."""
