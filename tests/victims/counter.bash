# usage: bash counter.bash REQUESTS ANSWERS: counts by itself, ten times a second at most; a line in the FIFO counts too.
exec 3<>"$1" 4>>"$2"
declare -A seen
n=0
trap 'echo "trap $n" >&4' USR1
while :; do
	n=$((n + 1))
	if read -r -t 0.05 line <&3; then
		seen[$line]=$n
		echo "line $line ${#seen[@]}" >&4
	fi
	echo "count $n" >&4
done
