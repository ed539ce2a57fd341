"""Jobs for schedulers: what a site allows, the script that is sent, and sending it."""
