"""Does a detector still hold on a new build of its model? Recorded once, checked after every change."""
