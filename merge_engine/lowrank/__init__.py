"""Thin matrices and small cores: sums of products, cuts to a rank."""
