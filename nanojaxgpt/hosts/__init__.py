"""The processes that train together, and each one itself: joining, agreeing, ending."""
