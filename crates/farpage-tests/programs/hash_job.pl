# A hash of many strings: filled, changed, sorted, joined. Prints a digest of what came of it.
use strict;
use warnings;
use Digest::MD5 qw(md5_hex);

my $n = shift // 200_000;
my (%h, $x);
$x = 12345;
for my $i (1 .. $n) {
    $x = ($x * 1103515245 + 12345) & 0x7fffffff;
    $h{"key$x"} = "value $i " . ("abcdefgh" x ($x % 12));
}
my $deleted = 0;
for my $k (sort keys %h) {
    if (length($h{$k}) % 3 == 0) {
        delete $h{$k};
        $deleted++;
    }
}
my $all = join "\n", map { "$_=$h{$_}" } sort keys %h;
print scalar(keys %h), " kept, $deleted deleted, ", length($all), " bytes, ", md5_hex($all), "\n";
