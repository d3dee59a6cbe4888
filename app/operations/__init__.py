"""Operations: what an operator stops for a while, such as the claims of workers or all writes."""
