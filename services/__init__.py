"""The services of Scrip, and the kit they are built with. A service imports kit and contracts, never another one."""
