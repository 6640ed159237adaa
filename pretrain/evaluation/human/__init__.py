"""Human evaluation: blind sheets of generated texts, and what raters say of them."""
