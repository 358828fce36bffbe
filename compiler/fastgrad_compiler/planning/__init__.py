"""What each attention becomes, at which cost and error."""
