"""A base that stays loaded and draws for programs that speak A1111's HTTP interface."""
