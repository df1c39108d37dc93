# usage: perl reader.pl REQUESTS ANSWERS TEXT: for each line through the FIFO one line of the text, read with a buffer.
use strict;
use warnings;
use IO::Handle;
my ($requests, $answers, $text) = @ARGV;
open(my $in, '+<', $requests) or die $!;
open(my $out, '>>', $answers) or die $!;
open(my $file, '<', $text) or die $!;
open(my $again, '<&', $file) or die $!;    # shares the offset
$out->autoflush(1);
my %seen = map { $_ => $_ * $_ } 1 .. 20000;
my $pattern = qr/^(\w+) (\d+)/;
print $out "ready\n";
while (my $line = <$in>) {
	chomp $line;
	my $next = <$file>;
	$next =~ $pattern or die $next;
	print $out "$line: $1 $2 $seen{$2} ", sysseek($again, 0, 1), "\n";
}
