"""`make attack`: random programs, and every claim that the product makes of them put to the test."""
